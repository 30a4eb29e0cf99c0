"""Where the kernels' tests run: a CUDA device where there is one, else the CPU through Triton's interpreter."""

import torch

from svf_fast.kernels import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# while tests are collected: before any of them imports Triton
CAN_RUN = DEVICE == "cuda" or interpreter.load()
