import torch
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.text.encoders import TextFeatures
def test_law():
    sizes=dict(scale_sizes=(1,2,3),codebook_size=32,codebook_dim=8,width=32,num_layers=2,num_heads=2,num_classes=3)
    for att in ("markov","causal"):
        torch.manual_seed(0); a=NextScaleTransformer(**sizes,scale_attention=att)
        b=NextScaleTransformer(**sizes,scale_attention=att,text_pooled_width=12,text_width=12)
        missing=b.load_state_dict(a.state_dict(),strict=False).missing_keys
        assert all('text' in k for k in missing)
        t=TextFeatures(torch.randn(2,5,12),torch.ones(2,5,dtype=torch.bool),torch.randn(2,12)); x=torch.randn(2,13,8); l=torch.tensor([0,3])
        assert torch.equal(a(l,x).logits,b(l,x,text=t).logits)
        b(l,x,text=t).logits.square().sum().backward()
        assert b.text_start.weight.grad.abs().sum()>0 and b.blocks[0].text.gate.grad.abs().sum()>0
    # compiled-free rope on VAR's block, text only
    c=NextScaleTransformer(**{**sizes,'num_classes':0},scale_attention="causal",position="rope2d",text_pooled_width=12,text_width=12)
    with torch.no_grad():
        for p in c.parameters(): p.add_(0.1*torch.randn_like(p))
    full=c(torch.zeros(2,dtype=torch.int64),x,text=t).logits
    with torch.no_grad():
        cond,cache=c.condition(torch.zeros(2,dtype=torch.int64),t),c.new_cache(2)
        parts=torch.cat([c.forward_scale(k,p,cond,cache) for k,p in enumerate(x.split([0,4,9],dim=1))],1)
    torch.testing.assert_close(parts,full.detach(),atol=5e-5,rtol=1e-5)
