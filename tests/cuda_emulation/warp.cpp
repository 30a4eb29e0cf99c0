// Warp-wide operations by their fragment layouts (PTX ISA: ldmatrix, mma.m16n8k16, mma.m16n8k8), and half precisions in software.
#include "state.h"

namespace emulation {

float from_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float size = exponent == 31 ? (mantissa != 0 ? NAN : INFINITY)
               : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return std::copysign(size, bits & 0x8000 ? -1.0f : 1.0f);
}

uint16_t to_float16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) {
    return 0x7FFF;
  }
  if (size >= 65520.0f) {
    return sign | 0x7C00;
  }
  // units of the last place: 2^-24 for what is subnormal; nearbyint rounds to nearest even
  const int exponent = size < 6.103515625e-05f ? -14 : std::ilogb(size);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(exponent + 14) << 10) + units));
}

uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) {
    return 0x7FFF;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float from_half(uint16_t bits, int kind) {
  if (kind == svf::cuda::ptx::kFloat16) {
    return from_float16(bits);
  }
  return svf::cuda::ptx::from_bits(uint32_t{bits} << 16);
}

float truncated(double sum) {
  const auto nearest = static_cast<float>(sum);
  return std::isfinite(nearest) && std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

// mma.m16n8k16 of half precisions, mma.m16n8k8 of TF32: where each lane's registers lie in a, b and the sum.
void multiply(Warp& warp, int kind) {
  const bool is_half = kind != svf::cuda::ptx::kTf32;
  const int depth = is_half ? 16 : 8;
  float a[16][16], b[16][8];
  double sum[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* words = warp.from<uint32_t>(lane);
    const int row = lane / 4, within = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int at = row + i % 2 * 8;
      if (is_half) {
        a[at][within * 2 + i / 2 * 8] = from_half(static_cast<uint16_t>(words[i]), kind);
        a[at][within * 2 + i / 2 * 8 + 1] = from_half(static_cast<uint16_t>(words[i] >> 16), kind);
      } else {
        // the hardware reads the upper 19 bits
        a[at][within + i / 2 * 4] = svf::cuda::ptx::from_bits(words[i] & 0xFFFFE000u);
      }
    }
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = words[4 + i];
      if (is_half) {
        b[within * 2 + i * 8][row] = from_half(static_cast<uint16_t>(word), kind);
        b[within * 2 + i * 8 + 1][row] = from_half(static_cast<uint16_t>(word >> 16), kind);
      } else {
        b[within + i * 4][row] = svf::cuda::ptx::from_bits(word & 0xFFFFE000u);
      }
    }
    for (int i = 0; i < 4; ++i) {
      sum[row + i / 2 * 8][within * 2 + i % 2] = svf::cuda::ptx::from_bits(words[6 + i]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < depth; ++k) {
      for (int n = 0; n < 8; ++n) {
        sum[m][n] += double{a[m][k]} * b[k][n];
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      warp.to<float>(lane)[i] = truncated(sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
  }
}

}  // namespace emulation

namespace svf::cuda::ptx {

// Each lane reads its own row, so that memory is checked, and the rows of a matrix have to lie in different banks.
static void load(uint32_t (&to)[4], uint32_t row, bool is_transposed) {
  struct Input {
    uint32_t row;
    unsigned char data[16];
  } input{row, {}};
  std::memcpy(input.data, emulation::read_shared(row, 16, 16), 16);
  const auto carry_out = [](emulation::Warp& warp) {
    const bool transposed = warp.kind == kLoadTransposed;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint32_t banks = 0;
      for (int i = 0; i < 8; ++i) {
        banks |= 1u << (warp.from<Input>(8 * matrix + i)->row / 16 % 8);
      }
      if (banks != 0xFF) {
        emulation::fail("ldmatrix: rows of one matrix lie in the same banks");
      }
      for (int lane = 0; lane < 32; ++lane) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int r = transposed ? lane % 4 * 2 + i : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + i;
          std::memcpy(&pair[i], warp.from<Input>(8 * matrix + r)->data + 2 * c, 2);
        }
        std::memcpy(warp.to<uint32_t>(lane) + matrix, pair, 4);
      }
    }
  };
  std::memcpy(to, emulation::together(is_transposed ? kLoadTransposed : kLoad, &input, sizeof(input), carry_out), 16);
}

void load_matrices(uint32_t (&to)[4], uint32_t row) { load(to, row, false); }

void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) { load(to, row, true); }

}  // namespace svf::cuda::ptx
