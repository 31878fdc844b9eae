// Packed depthwise 7x7 convolution over visible tiles on a CPU: forward (and input gradient), weight and bias gradient.
// Built by native.py with REAL = float or double, called by depthwise_cpu.py; a plain C interface, no header of torch.
//
// B images, V visible tiles, T tile side, C channels. tiles (B, V, T, T, C), weight (49, C), visible (B, V) int64 patch
// of every tile, slots (B, rows * columns) int32 tile of every patch or -1.
//
// A tile is cut into cells of side S = 8, 4, 2 or 1. The cells that a cell can see are looked up once, for all channels;
// a missing one is skipped, so only products that exist are computed. Over W channels at a time, a row of S outputs, the
// 7 weights of a kernel row and one pixel live in registers: 16 vectors. Accumulation is in the type of the tiles.

#include <algorithm>

#include "channels.h"

namespace {

constexpr int K = 7, R = K / 2;

struct Shape {
  int64_t batch, count, side, channels, rows, columns;
  const int64_t* visible;
  const int32_t* slots;
};

// Offsets, in numbers, of the cells within reach of one cell from the first tile of its image; -1 where there is none.
template <int S>
struct Neighbours {
  static constexpr int reach = (R + S - 1) / S, width = 2 * reach + 1;
  int64_t offset[width][width];

  Neighbours(const Shape& s, int64_t image, int64_t cell_y, int64_t cell_x) {
    const int64_t parts = s.side / S, row = s.side * s.channels;
    for (int dy = -reach; dy <= reach; ++dy)
      for (int dx = -reach; dx <= reach; ++dx) {
        const int64_t y = cell_y + dy, x = cell_x + dx;
        int64_t& at = offset[dy + reach][dx + reach];
        at = -1;
        if (y < 0 || x < 0 || y >= s.rows * parts || x >= s.columns * parts) continue;
        const int32_t slot = s.slots[(image * s.rows + y / parts) * s.columns + x / parts];
        if (slot >= 0) at = slot * s.side * row + y % parts * S * row + x % parts * S * s.channels;
      }
  }
};

// Calls visit(image, offset of the cell from the first tile of its image, its neighbours) for every cell of some tiles.
template <int S, typename Visit>
inline void for_cells(const Shape& s, int64_t begin, int64_t end, Visit visit) {
  const int64_t parts = s.side / S, row = s.side * s.channels;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t image = tile / s.count, patch = s.visible[tile];
    for (int64_t py = 0; py < parts; ++py)
      for (int64_t px = 0; px < parts; ++px) {
        const Neighbours<S> near(s, image, patch / s.columns * parts + py, patch % s.columns * parts + px);
        visit(image, (tile % s.count) * s.side * row + py * S * row + px * S * s.channels, near);
      }
  }
}

// Calls product(px, kx, pixel, weight index) for every product that a row of S outputs has with kernel row ky.
// The loops have constant bounds and unroll completely, so arrays indexed by px and kx stay in registers.
template <int S, typename A, typename T, typename Begin, typename Product>
inline void for_products(const T* tiles, const Neighbours<S>& near, int y, int ky, int64_t row, int64_t pixel, int64_t n,
                         Begin begin, Product product) {
  constexpr int reach = Neighbours<S>::reach;
  const int from = y + ky - R + reach * S;  // source row, counted from the first row of the uppermost neighbour
  const int64_t* offsets = near.offset[from / S];
  bool begun = false;
#pragma GCC unroll 7
  for (int dx = -reach; dx <= reach; ++dx) {
    if (offsets[dx + reach] < 0) continue;
    if (!begun) begin();
    begun = true;
    const T* source = tiles + offsets[dx + reach] + from % S * row;
#pragma GCC unroll 8
    for (int sx = 0; sx < S; ++sx) {
      const int at = dx * S + sx;
      if (at < -R || at >= S + R) continue;
      const auto x = A::load(source + sx * pixel, n);
#pragma GCC unroll 8
      for (int px = 0; px < S; ++px) {
        const int kx = at - px + R;
        if (kx >= 0 && kx < K) product(px, kx, x);
      }
    }
  }
}

template <typename T, int W, bool ALL, int S>
inline void convolve_cell(const Shape& s, const T* tiles, const T* weight, const T* bias, T* out,
                          const Neighbours<S>& near, int64_t n) {
  using A = Access<T, W, ALL>;
  using Vector = typename A::Vector;
  const int64_t pixel = s.channels, row = s.side * pixel;
  const Vector initial = bias ? A::load(bias, n) : Vector{};
  for (int y = 0; y < S; ++y) {
    Vector sum[S];
    for (int px = 0; px < S; ++px) sum[px] = initial;
    for (int ky = 0; ky < K; ++ky) {
      Vector w[K];
      for_products<S, A>(
          tiles, near, y, ky, row, pixel, n,
          [&] {
#pragma GCC unroll 7
            for (int kx = 0; kx < K; ++kx) w[kx] = A::load(weight + (ky * K + kx) * pixel, n);
          },
          [&](int px, int kx, const Vector& x) { sum[px] += x * w[kx]; });
    }
    for (int px = 0; px < S; ++px) A::store(out + y * row + px * pixel, sum[px], n);
  }
}

template <typename T, int W, bool ALL, int S>
inline void accumulate_cell(const Shape& s, const T* tiles, const T* grad, T* weight_grad, T* bias_grad,
                            const Neighbours<S>& near, int64_t n) {
  using A = Access<T, W, ALL>;
  using Vector = typename A::Vector;
  const int64_t pixel = s.channels, row = s.side * pixel;
  Vector total = A::load(bias_grad, n);
  for (int y = 0; y < S; ++y) {
    Vector g[S];
    for (int px = 0; px < S; ++px) {
      g[px] = A::load(grad + y * row + px * pixel, n);
      total += g[px];
    }
    for (int ky = 0; ky < K; ++ky) {
      Vector sum[K];
      bool begun = false;
      for_products<S, A>(
          tiles, near, y, ky, row, pixel, n,
          [&] {
            begun = true;
#pragma GCC unroll 7
            for (int kx = 0; kx < K; ++kx) sum[kx] = A::load(weight_grad + (ky * K + kx) * pixel, n);
          },
          [&](int px, int kx, const Vector& x) { sum[kx] += x * g[px]; });
      if (!begun) continue;
#pragma GCC unroll 7
      for (int kx = 0; kx < K; ++kx) A::store(weight_grad + (ky * K + kx) * pixel, sum[kx], n);
    }
  }
  A::store(bias_grad, total, n);
}

template <typename T, int S>
void convolve(const Shape& s, const T* tiles, const T* weight, const T* bias, T* out, int threads) {
  const int64_t total = s.batch * s.count, image_size = s.count * s.side * s.side * s.channels;
  // A few runs of tiles per thread: what a tile costs depends on its neighbours.
  const int64_t runs = std::min<int64_t>(total, threads * 8);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t run = 0; run < runs; ++run)
    for_cells<S>(s, total * run / runs, total * (run + 1) / runs, [&](int64_t image, int64_t at, const auto& near) {
      const int64_t first = image * image_size;
      for_channels<T>(0, s.channels, [&]<int W, bool ALL>(int64_t c, int64_t n) {
        convolve_cell<T, W, ALL, S>(s, tiles + first + c, weight + c, bias ? bias + c : nullptr, out + first + at + c,
                                    near, n);
      });
    });
}

// One sum per run of tiles, (runs, 50, C): 49 rows of weight gradient, one of bias gradient; all zero at the start. The
// number of runs belongs to the caller, so that the order of the additions does not depend on the number of threads.
template <typename T, int S>
void accumulate(const Shape& s, const T* tiles, const T* grad, T* sums, int64_t runs, int threads) {
  const int64_t total = s.batch * s.count, image_size = s.count * s.side * s.side * s.channels;
  // Channels are shared out as well where there are few runs, in whole vectors.
  const int64_t parts = std::min<int64_t>((2 * threads + runs - 1) / runs, (s.channels + 63) / 64);
  const int64_t width = ((s.channels + parts - 1) / parts + 15) / 16 * 16;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t item = 0; item < runs * parts; ++item) {
    const int64_t run = item / parts, begin = std::min(item % parts * width, s.channels);
    const int64_t end = std::min(begin + width, s.channels);
    T* sum = sums + run * (K * K + 1) * s.channels;
    for_cells<S>(s, total * run / runs, total * (run + 1) / runs, [&](int64_t image, int64_t at, const auto& near) {
      const int64_t first = image * image_size;
      for_channels<T>(begin, end, [&]<int W, bool ALL>(int64_t c, int64_t n) {
        accumulate_cell<T, W, ALL, S>(s, tiles + first + c, grad + first + at + c, sum + c,
                                      sum + K * K * s.channels + c, near, n);
      });
    });
  }
}

// Calls run<S>() for the cell side S: the largest of 8, 4, 2, 1 that divides the tile side.
template <typename Run>
inline void with_cell(int64_t side, Run run) {
  if (side % 8 == 0) run.template operator()<8>();
  else if (side % 4 == 0) run.template operator()<4>();
  else if (side % 2 == 0) run.template operator()<2>();
  else run.template operator()<1>();
}

}  // namespace

// Sizes are B, V, T, C, rows, columns. The bias may be null. Pointers are to contiguous memory.
extern "C" void fcmae_convolve(const int64_t* sizes, const int64_t* visible, const int32_t* slots, const REAL* tiles,
                               const REAL* weight, const REAL* bias, REAL* out, int64_t threads) {
  const Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], visible, slots};
  with_cell(s.side, [&]<int S>() { convolve<REAL, S>(s, tiles, weight, bias, out, static_cast<int>(threads)); });
}

extern "C" void fcmae_accumulate(const int64_t* sizes, const int64_t* visible, const int32_t* slots, const REAL* tiles,
                                 const REAL* grad, REAL* sums, int64_t runs, int64_t threads) {
  const Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], visible, slots};
  with_cell(s.side, [&]<int S>() { accumulate<REAL, S>(s, tiles, grad, sums, runs, static_cast<int>(threads)); });
}
