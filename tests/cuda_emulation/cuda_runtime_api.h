// Stands in for the CUDA toolkit's header where the kernels are compiled for the host: no toolkit is needed to run their tests.
#pragma once

#include <cstdint>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801, cudaErrorUnknown = 999 };
using cudaStream_t = void*;

// What the emulator found wrong last, or the error's name.
const char* cudaGetErrorString(cudaError_t error);
