"""Few-shot segmentation on top of svf_fast: data, backbones, methods, tuning strategies, training, evaluation, the demo."""
