// Rows of channels between tensors and a tile: reading and writing one vector of any element type, rows gathered into the left
// operand. Included inside the namespace of the instruction set.

template <class T>
Vec read_whole(const T* p);
template <>
inline Vec read_whole(const float* p) { return load(p); }
template <>
inline Vec read_whole(const uint16_t* p) { return load_bfloat16(p); }
template <>
inline Vec read_whole(const int8_t* p) { return load_int8(p); }

inline void write_whole(float* p, Vec v) { store(p, v); }
inline void write_whole(uint16_t* p, Vec v) { store_bfloat16(p, v); }
inline void write_whole(int8_t* p, Vec v) { store_int8(p, v); }

// The first `count` elements at p, at most a vector of them; zeros behind.
template <class T>
inline Vec read(const T* p, int64_t count) {
  if (count >= kWidth) return read_whole(p);
  T part[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return read_whole(part);
}

template <class T>
inline void write(T* p, Vec v, int64_t count) {
  if (count >= kWidth) return write_whole(p, v);
  T part[kWidth];
  write_whole(part, v);
  for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}

// The bits of the non-zero elements among the first `count`, a multiple of eight, at a whole byte.
inline void write_bits(uint8_t* mask, Vec v, int64_t count) {
  const uint32_t bits = nonzero_bits(v);
  __builtin_memcpy(mask, &bits, (count < kWidth ? count : kWidth) / 8);
}

// `count` bits of a mask from bit `at` on.
inline uint32_t read_bits(const uint8_t* mask, int64_t at, int64_t count) {
  if (count > kWidth) count = kWidth;
  const int64_t shift = at & 7, bytes = (shift + count + 7) >> 3;
  uint32_t bits = 0;
  for (int64_t i = 0; i < bytes; ++i) bits |= static_cast<uint32_t>(mask[(at >> 3) + i]) << (8 * i);
  return bits >> shift;
}

// One vector of a left operand's row at channel c; `count` channels in all.
inline void put_left(float* a, int64_t c, Vec v, int64_t) { store(a + c, v); }
inline void put_left(uint32_t* a, int64_t c, Vec v, int64_t count) {
  auto* halves = reinterpret_cast<uint16_t*>(a);
  write(halves + c, v, count - c);
  if (c + kWidth >= count)
    for (int64_t i = count; i < units<Half>(count) * Half::kElements; ++i) halves[i] = 0;
}

// Channels [first, first + count) of rows (null: zeros) as a left operand.
template <class T, class Unit>
inline void gather(const T* const* rows, int64_t number, int64_t first, int64_t count, Unit* a, int64_t lda) {
  for (int64_t i = 0; i < number; ++i, a += lda)
    for (int64_t c = 0; c < count; c += kWidth)
      put_left(a, c, rows[i] == nullptr ? zero() : read(rows[i] + first + c, count - c), count);
}
// bfloat16 stays as it is
inline void gather(const uint16_t* const* rows, int64_t number, int64_t first, int64_t count, uint32_t* a, int64_t lda) {
  const size_t bytes = count * sizeof(uint16_t), spare = units<Half>(count) * sizeof(uint32_t) - bytes;
  for (int64_t i = 0; i < number; ++i, a += lda) {
    if (rows[i] == nullptr)
      __builtin_memset(a, 0, bytes);
    else
      __builtin_memcpy(a, rows[i] + first, bytes);
    __builtin_memset(reinterpret_cast<char*>(a) + bytes, 0, spare);
  }
}

// v as it would be read back from memory of type T.
template <class T>
inline Vec rounded(Vec v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  T memory[kWidth];
  write_whole(memory, v);
  return read_whole(memory);
}

// A tile's row of single precision as a left operand's row, times `factor`.
template <class T, class Unit>
inline void weighted(const float* row, const float* factor, int64_t count, Unit* a) {
  for (int64_t c = 0; c < count; c += kWidth)
    put_left(a, c, mul(rounded<T>(load(row + c)), read(factor + c, count - c)), count);
}

// Where the pixels of a tile lie: number among all pixels, picture, row and column of each.
struct Pixels {
  int64_t count = 0;
  int64_t number[kTilePixels];
  int32_t n[kTilePixels], y[kTilePixels], x[kTilePixels];

  // `size` pixels from `first` on of pictures [height, width]
  void fill(int64_t first, int64_t size, int64_t height, int64_t width) {
    int64_t column = first % width, row = first / width % height, picture = first / width / height;
    count = 0;
    for (int64_t i = 0; i < size; ++i) {
      add(first + i, picture, row, column);
      if (++column == width) {
        column = 0;
        if (++row == height) row = 0, ++picture;
      }
    }
  }
  void add(int64_t at, int64_t picture, int64_t row, int64_t column) {
    number[count] = at;
    n[count] = static_cast<int32_t>(picture);
    y[count] = static_cast<int32_t>(row);
    x[count] = static_cast<int32_t>(column);
    ++count;
  }
};

template <class T>
inline T* at(const Picture& p, int64_t n, int64_t y, int64_t x) {
  return static_cast<T*>(p.data) + n * p.n + y * p.h + x * p.w;
}

// Rows of a picture at the pixels of a tile, or at every stride-th pixel.
template <class T>
inline void rows_at(const Picture& p, const Pixels& pixels, const int64_t* stride, T** rows) {
  for (int64_t i = 0; i < pixels.count; ++i)
    rows[i] = at<T>(p, pixels.n[i], pixels.y[i] * stride[0], pixels.x[i] * stride[1]);
}

// Columns of a result, into the channels from `column` on of each row's place.
template <class T>
inline void write_rows(const float* sums, int64_t ld, int64_t rows, int64_t column, int64_t width, T* const* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; c += kWidth) write(to[i] + column + c, load(sums + i * ld + c), width - c);
}
