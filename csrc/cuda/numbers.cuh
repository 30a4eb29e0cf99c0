// Element types in memory, eight channels at a time in registers, and how each kind of product is multiplied by a warp.
#pragma once

#include "launch.h"
#include "ptx.cuh"

namespace svf::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What 16-byte accesses are made of. (CUDA's own vector types would need its headers in the emulator.)
struct alignas(16) Vector16 {
  uint32_t word[4];
};
struct alignas(8) Vector8 {
  uint32_t word[2];
};

// Eight adjacent channels of a pixel: one byte of mask, one vector of a half precision, two of float32.
struct Octet {
  float value[8];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) { return ptx::from_bits(uint32_t{value.bits} << 16); }
__device__ __forceinline__ float to_float(Float16 value) { return ptx::from_float16(value.bits); }

template <class T>
struct Half;

template <>
struct Half<BFloat16> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return ptx::pack_bfloat16(low, high); }
};
template <>
struct Half<Float16> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return ptx::pack_float16(low, high); }
};

template <class T>
__device__ __forceinline__ T from_float(float value) {
  return T{static_cast<uint16_t>(Half<T>::pack(value, 0.0f))};
}
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}

// Elements of T in 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ __forceinline__ void unpack(const Vector16& vector, float* to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = ptx::from_bits(vector.word[i]);
    } else {
      to[2 * i] = to_float(T{static_cast<uint16_t>(vector.word[i])});
      to[2 * i + 1] = to_float(T{static_cast<uint16_t>(vector.word[i] >> 16)});
    }
  }
}

template <class T>
__device__ __forceinline__ Vector16 pack_vector(const float* from) {
  Vector16 vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      vector.word[i] = ptx::to_bits(from[i]);
    } else {
      vector.word[i] = Half<T>::pack(from[2 * i], from[2 * i + 1]);
    }
  }
  return vector;
}

// Up to 8 elements at `from`, zeros after the `count`-th.
template <class T>
__device__ __forceinline__ Octet load_octet(const T* from, int count, bool is_aligned) {
  Octet octet;
  if (is_aligned && count >= 8) {
#pragma unroll
    for (int i = 0; i < 8; i += kVector<T>) {
      unpack<T>(ptx::load_global(reinterpret_cast<const Vector16*>(from + i)), octet.value + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      octet.value[i] = i < count ? to_float(ptx::load_global(from + i)) : 0.0f;
    }
  }
  return octet;
}

template <class T>
__device__ __forceinline__ void store_octet(T* to, const Octet& octet, int count, bool is_aligned) {
  if (is_aligned && count >= 8) {
#pragma unroll
    for (int i = 0; i < 8; i += kVector<T>) {
      ptx::store_global(reinterpret_cast<Vector16*>(to + i), pack_vector<T>(octet.value + i));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) {
        ptx::store_global(to + i, from_float<T>(octet.value[i]));
      }
    }
  }
}

// The octet as it is once stored as T.
template <class T>
__device__ __forceinline__ void round_to(Octet& octet) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const uint32_t bits = Half<T>::pack(octet.value[i], octet.value[i + 1]);
      octet.value[i] = to_float(T{static_cast<uint16_t>(bits)});
      octet.value[i + 1] = to_float(T{static_cast<uint16_t>(bits >> 16)});
    }
  }
}

// Operand registers of one warp-wide product, rounded as its kind asks for; `low` is what the first rounding left (three products).
template <Products P>
struct Operand {
  static constexpr bool kIsSplit = P == Products::kTf32x3;
  uint32_t high[4];
  uint32_t low[kIsSplit ? 4 : 1];

  __device__ __forceinline__ void round() {
    if constexpr (P == Products::kTf32 || kIsSplit) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = ptx::from_bits(high[i]);
        high[i] = ptx::to_tf32(value);
        if constexpr (kIsSplit) {
          low[i] = ptx::to_tf32(value - ptx::from_bits(high[i]));
        }
      }
    }
  }
};

// sum [16, 8] += a b, where b's columns are those of its registers `first` and `first` + 1.
template <Products P>
__device__ __forceinline__ void multiply(float (&sum)[4], const Operand<P>& a, const Operand<P>& b, int first) {
  if constexpr (P == Products::kTf32x3) {
    // small terms first, into a sum of their own: tensor cores truncate what they add to, and over a long contraction that adds up
    float part[4] = {};
    ptx::multiply_tf32(part, a.low, b.high[first], b.high[first + 1]);
    ptx::multiply_tf32(part, a.high, b.low[first], b.low[first + 1]);
    ptx::multiply_tf32(part, a.high, b.high[first], b.high[first + 1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] += part[i];
    }
  } else if constexpr (P == Products::kBFloat16) {
    ptx::multiply_bfloat16(sum, a.high, b.high[first], b.high[first + 1]);
  } else if constexpr (P == Products::kFloat16) {
    ptx::multiply_float16(sum, a.high, b.high[first], b.high[first + 1]);
  } else {
    ptx::multiply_tf32(sum, a.high, b.high[first], b.high[first + 1]);
  }
}

template <Products P>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<Products::kBFloat16> {
  using type = BFloat16;
};
template <>
struct ElementOf<Products::kFloat16> {
  using type = Float16;
};

// Calls body with a constant for `products` or `element`.
template <Products P>
struct ProductsConstant {
  static constexpr Products value = P;
};

template <class Body>
cudaError_t for_products(Products products, Body body) {
  switch (products) {
    case Products::kBFloat16: return body(ProductsConstant<Products::kBFloat16>{});
    case Products::kFloat16: return body(ProductsConstant<Products::kFloat16>{});
    case Products::kTf32: return body(ProductsConstant<Products::kTf32>{});
    case Products::kTf32x3: return body(ProductsConstant<Products::kTf32x3>{});
  }
  return cudaErrorInvalidValue;
}

template <class Body>
cudaError_t for_element(Element element, Body body) {
  switch (element) {
    case Element::kBFloat16: return body(BFloat16{});
    case Element::kFloat16: return body(Float16{});
    case Element::kFloat32: return body(float{});
  }
  return cudaErrorInvalidValue;
}

__host__ __device__ constexpr int64_t divide_up(int64_t total, int64_t size) { return (total + size - 1) / size; }

constexpr int larger(int a, int b) { return a > b ? a : b; }

// Host side: whether rows of these byte strides can be read 16 bytes at a time.
inline bool is_aligned(const void* data, int64_t stride_bytes) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride_bytes)) % 16 == 0;
}

template <class T>
bool is_aligned(const Picture& picture) {
  return is_aligned(picture.data, (picture.n | picture.h | picture.w) * static_cast<int64_t>(sizeof(T)));
}

template <class T>
bool is_aligned(const Matrix& matrix) {
  return is_aligned(matrix.data, matrix.columns * static_cast<int64_t>(sizeof(T)));
}

}  // namespace svf::cuda
