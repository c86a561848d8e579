import pytest, torch
import torch.nn.functional as F
from isthmus.next_scale.conversion import build_prior, convert_switti_state
from isthmus.next_scale.sampling import AskedTexts, ScaleSampler
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.options import SamplingOptions, SmoothSchedule
from isthmus.text.encoders import TextFeatures
from tests.testers import assert_parity
import json
import pathlib
C=json.loads(pathlib.Path('/work/shared/golden/switti/config.json').read_text())['networks']
RUNS=[(n,r) for n in C for r in C[n]['generations']]
def prior(golden, name, causal=False):
    raw=golden.tensors(f'switti/{name}_state.safetensors')
    if causal: raw['attn_bias_for_masking']=golden.tensors(f'switti/{name}_causal_io.safetensors')['in.attn_bias_for_masking']
    s=C[name]
    conv=convert_switti_state(raw, s['num_heads'], s['rope_theta'], s['rope_size'])
    return build_prior(conv)
@pytest.mark.parametrize('name',list(C))
def test_logits(golden,name):
    for causal in (False,True):
        if causal and name=='small': continue
        m=prior(golden,name,causal); assert m.is_markov != causal
        io=golden.tensors(f'switti/{name}_io.safetensors')
        exp=io if not causal else golden.tensors(f'switti/{name}_causal_io.safetensors')
        t=TextFeatures(io['in.text_hidden'],io['in.text_mask'],io['in.text_pooled']).rows(slice(2))
        with torch.no_grad(): lo=m(torch.zeros(2,dtype=torch.int64),io['in.x_wo_first_l'],text=t,image_sizes=io.get('in.image_sizes')).logits
        print(name,causal,float((lo-exp['out.logits']).abs().max()))
        assert_parity(lo,exp['out.logits'],2e-5)
        assert sum(p.numel() for p in m.parameters()) + (len(m.size_condition.frequency_bits) if m.size_condition else 0) == C[name]['params']
@pytest.mark.parametrize('name,run',RUNS)
def test_generation(golden,name,run,tokenizer):
    kind,what=run.split('.'); s=C[name]['generations'][run]
    m=prior(golden,name,kind=='causal')
    io=golden.tensors(f'switti/{name}_io.safetensors')
    g=golden.tensors(f"switti/{name}_{'causal_' if kind=='causal' else ''}generation.safetensors")
    K=4; on,off=s.get('turn_on_cfg_start_si',0),s['turn_off_cfg_start_si']; late=s.get('last_scale_temp')
    options=SamplingOptions(guidance_scale=GuidanceSchedule('linear',1.0,1.0+s['cfg'],off-1 if off<K else None,on),
        top_k=s['top_k'] or None,top_p=s['top_p'],
        temperature=1.0 if late is None else tuple(late if k>=max(off,on) else 1.0 for k in range(K)),
        smooth=SmoothSchedule(s['smooth_start_si'],off-1,False) if s.get('more_smooth') else False)
    texts=AskedTexts(TextFeatures(io['in.text_hidden'],io['in.text_mask'],io['in.text_pooled']),torch.tensor([0,1]))
    sam=ScaleSampler(tokenizer,m,torch.zeros(2,dtype=torch.int64),[(7,0),(7,1)],options,texts=texts)
    f=sam.start(); worst=0
    smoothed=False
    for k in range(K):
        d=sam.draw(k,sam.predict(k,f)); r=k/(K-1)
        tol=max(2e-5,(1+2*s['cfg']*r)*5e-6)
        if late and k>=off: tol=2e-5/late
        if smoothed: tol=1e-3
        e=float((d.logits-g[f'{what}.logits.{k}']).abs().max()); worst=max(worst,e/tol); assert e<=tol,(k,e,tol)
        sm=s.get('more_smooth') and s['smooth_start_si']<=k<off
        if f'{what}.idx.{k}' in g and not sm: assert torch.equal(d.token_ids,g[f'{what}.idx.{k}'].long()),k
        if f'{what}.codes.{k}' in g: assert_parity(d.codes,g[f'{what}.codes.{k}'].view_as(d.codes),1e-4)
        smoothed|=bool(sm)
        f=sam.add(k,f,d.codes)
    img=(tokenizer.decode_features(f).clamp(-1,1)+1)/2
    print(name,run,'worst/tol',worst,'image',float((img.detach()-g[f'{what}.image01']).abs().max()))
    assert_parity(img,g[f'{what}.image01'],1e-4)
