"""Keys under which the dataset node records facts for training in its latents and conditionings.

ComfyUI ignores them. Other nodes may read them, so their values must not change.
"""

# In a latent dictionary: {"picture": index of the image, repeats counted, "variant": index of its variant}, and for a
# regularisation image "regularisation": its weight. Missing for an image of the style with a single variant.
VARIANT_KEY = "aclora"

# In the options of each conditioning entry: the caption that was encoded.
CAPTION_KEY = "aclora_caption"
