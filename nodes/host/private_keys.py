"""Keys under which the dataset node records facts for training in its latents and conditionings.

ComfyUI ignores them. Other nodes may read them, so their values must not change.
"""

# In a latent dictionary: {"picture": index of the image, repeats counted, "variant": index of its variant}, and for a
# regularisation image "regularisation": its weight. Missing for an image of the style with a single variant.
VARIANT_KEY = "aclora"

# In the options of each conditioning entry: the caption that was encoded, as it is written.
CAPTION_KEY = "aclora_caption"

# Beside it, True if the caption was encoded as text. Where it is missing the caption is a prompt, in ComfyUI's syntax.
TEXT_KEY = "aclora_is_text"

# Beside it, the trigger word of the dataset; missing if there is none.
TRIGGER = "aclora_trigger"

# Beside it, the name of the dataset's folder.
DATASET = "aclora_dataset"
