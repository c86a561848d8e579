"""Who made the built-in images, and on what terms: printed by `isthmus info data`, written into model cards."""

OPENMOJI_ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/). Changed: rendered as small bitmaps."
)

TWEMOJI_ATTRIBUTION = (
    "Emoji drawings of Twemoji, copyright 2019 Twitter, Inc and other contributors, under CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/). Changed: rendered as small bitmaps."
)

PHOTOS_ATTRIBUTION = (
    "Ten photographs shipped with scikit-image and scikit-learn. CC0 or public domain (NASA, SpaceX, CC0 Textures and "
    "named photographers, see the docstrings of skimage.data), but for two under CC BY 2.0 "
    "(https://creativecommons.org/licenses/by/2.0/): palace (china.jpg) by danielbuechele, flower (flower.jpg) by "
    "vultilion. Changed: cropped and resized."
)

AVATARS_ATTRIBUTION = (
    "Drawings made by DiceBear (https://www.dicebear.com) in styles under CC0 1.0 "
    "(https://creativecommons.org/publicdomain/zero/1.0/)."
)

ATTRIBUTIONS = {
    "avatars": AVATARS_ATTRIBUTION,
    "emoji": TWEMOJI_ATTRIBUTION,
    "openmoji": OPENMOJI_ATTRIBUTION,
    "photos": PHOTOS_ATTRIBUTION,
}
"""By the name of `--data`."""
