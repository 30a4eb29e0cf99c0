// The largest cosine of each query position to any support row, panel by panel of queries and tile by tile of supports. Included
// inside the namespace of the instruction set.

// The running maximum of one panel of queries over a tile of products [rows, kPanel].
inline void keep_largest(
    const MaxCosine& m, const float* product, int64_t ldp, int64_t first, int64_t rows, const float* query_norm, float* best,
    int32_t* winner) {
  for (int64_t c = 0; c < kPanel; c += kWidth) {
    Vec largest = load(best + c);
    Bits position = load_bits(winner + c);
    for (int64_t i = 0; i < rows; ++i) {
      const Vec norms = fma(set(m.support_norm[first + i]), load(query_norm + c), set(m.eps));
      const auto index = static_cast<int32_t>(m.first + first + i);
      keep_larger(div(load(product + i * ldp + c), norms), index, largest, position);
    }
    store(best + c, largest);
    store_bits(winner + c, position);
  }
}

inline void max_cosine_of(const MaxCosine& m, const Threads& threads) {
  // rows of supports and columns of queries that lie in cache together
  const Tiling groups = deal_out(round_up(m.queries, kPanel) / kPanel, kGroupColumns / kPanel, threads.count);
  in_parallel(threads, groups.tiles, [&](int64_t begin, int64_t end) {
    const Buffers<Single> tile(kForwardPixels, 1);
    alignas(64) float best[kGroupColumns], norm[kGroupColumns];
    alignas(64) int32_t winner[kGroupColumns];
    for (int64_t group = begin; group < end; ++group) {
      const int64_t column = groups.begin(group) * kPanel, columns = groups.size(group) * kPanel;
      const int64_t width = m.queries - column < columns ? m.queries - column : columns;
      for (int64_t c = 0; c < columns; ++c) {
        best[c] = c < width ? m.value[column + c] : 0;
        winner[c] = c < width ? m.winner[column + c] : 0;
        norm[c] = c < width ? m.query_norm[column + c] : 0;
      }
      for (int64_t first = 0; first < m.supports; first += kForwardPixels) {
        const int64_t rows = m.supports - first < kForwardPixels ? m.supports - first : kForwardPixels;
        const float* support = m.support + first * m.channels;
        for (int64_t c = 0; c < columns; c += kPanel) {
          multiply_full<Single>(
              rows, support, m.channels, static_cast<const float*>(m.query), m.channels, column + c, tile.product, kPanel);
          keep_largest(m, tile.product, kPanel, first, rows, norm + c, best + c, winner + c);
        }
      }
      for (int64_t c = 0; c < width; ++c) m.value[column + c] = best[c], m.winner[column + c] = winner[c];
    }
  });
}
