"""From folders of pictures and label images to few-shot episodes as tensors. Knows nothing of networks and training."""

VOID = 255  # label value of pixels that count neither for nor against a prediction
