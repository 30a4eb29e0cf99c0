"""From folders of pictures and label images to few-shot episodes as tensors. Knows nothing of networks and training."""

BACKGROUND = 0  # label value of pixels of no class
VOID = 255  # label value of pixels that count neither for nor against a prediction
