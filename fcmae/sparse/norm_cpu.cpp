// LayerNorm over channels and its gradient, on a CPU, each one pass over memory. Built by native.py with REAL = float or
// double, called by pointwise_cpu.py; a plain C interface, no header of torch.
//
// Rows of C channels; what stands beside them, mean and rstd (the reciprocal of the standard deviation), is one number
// per row. The normalised side may be in patch order: where rows are the positions of square tiles of side `side`, the
// stride × stride positions of a patch lie together, as a convolution of that kernel and stride reads them.

#include <algorithm>
#include <cmath>
#include <limits>

#include "channels.h"

namespace {

// A sum over channels that were met as whole, half and partial vectors.
template <typename T>
struct Sum {
  static constexpr int W = VECTOR_BYTES / sizeof(T), H = W / 2;
  typename Channels<T, W>::type whole{};
  typename Channels<T, H>::type half{};

  template <int N, bool ALL>
  inline void add(typename Channels<T, N>::type v, int64_t n) {
    if constexpr (!ALL)
      for (int64_t i = n; i < N; ++i) v[i] = 0;
    if constexpr (N == W) whole += v;
    else half += v;
  }
  inline T total() const {
    T lanes[H];
    for (int i = 0; i < H; ++i) lanes[i] = whole[i] + whole[i + H] + half[i];
    for (int width = H / 2; width > 0; width /= 2)  // pairwise: fewer additions wait for each other
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
  }
};

// Where a row goes in patch order.
struct Patches {
  int64_t side, stride;

  inline int64_t operator()(int64_t row) const {
    if (stride == 1) return row;
    const int64_t tile = row / (side * side), y = row / side % side, x = row % side;
    const int64_t patch = (tile * (side / stride) + y / stride) * (side / stride) + x / stride;
    return (patch * stride + y % stride) * stride + x % stride;
  }
};

template <typename T>
inline void normalise_row(const T* x, int64_t channels, const T* weight, const T* bias, T eps, T* y, T* mean, T* rstd) {
  Sum<T> first, second;
  for_channels<T>(0, channels, [&]<int W, bool ALL>(int64_t c, int64_t n) {
    first.template add<W, ALL>(Access<T, W, ALL>::load(x + c, n), n);
  });
  const T middle = first.total() / channels;
  for_channels<T>(0, channels, [&]<int W, bool ALL>(int64_t c, int64_t n) {
    const auto d = Access<T, W, ALL>::load(x + c, n) - middle;
    second.template add<W, ALL>(d * d, n);
  });
  const T variance = second.total() / channels + eps;
  // A row that overflows becomes NaN, as in torch's: 1 / sqrt(inf) = 0 would hide that a run has diverged.
  const T factor = std::isinf(variance) ? std::numeric_limits<T>::quiet_NaN() : 1 / std::sqrt(variance);
  for_channels<T>(0, channels, [&]<int W, bool ALL>(int64_t c, int64_t n) {
    using A = Access<T, W, ALL>;
    A::store(y + c, (A::load(x + c, n) - middle) * factor * A::load(weight + c, n) + A::load(bias + c, n), n);
  });
  *mean = middle;
  *rstd = factor;
}

// Adds to the gradients of weight and bias; y, the normalised row, is written again unless it is null.
template <typename T>
inline void gradient_row(const T* grad, const T* x, int64_t channels, const T* weight, const T* bias, T mean, T rstd,
                         T* grad_x, T* y, T* grad_weight, T* grad_bias) {
  Sum<T> plain, scaled;
  for_channels<T>(0, channels, [&]<int W, bool ALL>(int64_t c, int64_t n) {
    using A = Access<T, W, ALL>;
    const auto g = A::load(grad + c, n), unit = (A::load(x + c, n) - mean) * rstd, own = g * A::load(weight + c, n);
    plain.template add<W, ALL>(own, n);
    scaled.template add<W, ALL>(own * unit, n);
    A::store(grad_weight + c, A::load(grad_weight + c, n) + g * unit, n);
    A::store(grad_bias + c, A::load(grad_bias + c, n) + g, n);
  });
  const T of_mean = plain.total() / channels, of_deviation = scaled.total() / channels;
  for_channels<T>(0, channels, [&]<int W, bool ALL>(int64_t c, int64_t n) {
    using A = Access<T, W, ALL>;
    const auto unit = (A::load(x + c, n) - mean) * rstd, w = A::load(weight + c, n);
    A::store(grad_x + c, (A::load(grad + c, n) * w - of_mean - unit * of_deviation) * rstd, n);
    if (y) A::store(y + c, unit * w + A::load(bias + c, n), n);
  });
}

}  // namespace

extern "C" void fcmae_norm(int64_t rows, int64_t channels, int64_t side, int64_t stride, const REAL* x,
                           const REAL* weight, const REAL* bias, double eps, REAL* y, REAL* mean, REAL* rstd,
                           int64_t threads) {
  const Patches place{side, stride};
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    normalise_row(x + row * channels, channels, weight, bias, static_cast<REAL>(eps), y + place(row) * channels,
                  mean + row, rstd + row);
}

// `grad` and `y`, which may be null, are in patch order; grad_weight and grad_bias (C,) are the sums over all rows, taken
// in `runs` parts, so that they do not depend on the number of threads.
extern "C" void fcmae_norm_gradient(int64_t rows, int64_t channels, int64_t side, int64_t stride, int64_t runs,
                                    const REAL* grad, const REAL* x, const REAL* weight, const REAL* bias,
                                    const REAL* mean, const REAL* rstd, REAL* grad_x, REAL* y, REAL* grad_weight,
                                    REAL* grad_bias, int64_t threads) {
  const Patches place{side, stride};
  Zeros<REAL> memory(2 * runs * channels);
  REAL* sums = memory.data();
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t run = 0; run < runs; ++run) {
    REAL* sum = sums + 2 * run * channels;
    for (int64_t row = rows * run / runs; row < rows * (run + 1) / runs; ++row) {
      const int64_t at = place(row) * channels;
      gradient_row(grad + at, x + row * channels, channels, weight, bias, mean[row], rstd[row],
                   grad_x + row * channels, y ? y + at : nullptr, sum, sum + channels);
    }
  }
  for (int64_t run = 1; run < runs; ++run)
    for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += sums[2 * run * channels + c];
  std::copy_n(sums, channels, grad_weight);
  std::copy_n(sums + channels, channels, grad_bias);
}
