// prediction_loss on the CPU: 2 - 2 cos of predictions and their targets, each read once in either direction.
#include <cmath>

#include "../common.h"
#include "isa.h"
#include "pack.h"
#include "threads.h"

MATPAC_DECLARE(void prediction_loss_forward(const PredictionLossArgs& args, int64_t begin, int64_t end))
MATPAC_DECLARE(void prediction_loss_backward(const PredictionLossArgs& args, int64_t begin, int64_t end))

namespace matpac::MATPAC_ISA {
namespace {

template <typename T>
struct Vectors {
  const T *prediction, *target, *grad;
  T *loss, *stats, *out;
  int64_t heads, width;
  double eps;

  explicit Vectors(const PredictionLossArgs& a)
      : prediction(static_cast<const T*>(a.prediction)),
        target(static_cast<const T*>(a.target)),
        grad(static_cast<const T*>(a.grad)),
        loss(static_cast<T*>(a.loss)),
        stats(static_cast<T*>(a.stats)),
        out(static_cast<T*>(a.out)),
        heads(a.heads),
        width(a.width),
        eps(a.eps) {}
};

// The sums of x * x and of x * y.
struct Sums {
  double squares, products;
};
template <typename T>
MATPAC_INLINE Sums sums(const T* x, const T* y, int64_t n) {
  using P = Pack<T>;
  const int64_t whole = n / P::lanes * P::lanes;
  P squares = P::fill(T(0)), products = squares;
  for (int64_t i = 0; i < whole; i += P::lanes) {
    const P p = P::load(x + i);
    squares = squares + p * p;
    products = products + p * P::load(y + i);
  }
  if (const int rest = int(n - whole)) {
    const P p = P::load(x + whole, rest, T(0));
    squares = squares + p * p;
    products = products + p * P::load(y + whole, rest, T(0));
  }
  return {squares.sum(), products.sum()};
}

// No less than eps; NaN stays NaN.
MATPAC_INLINE double length(double squares, double eps) {
  const double out = std::sqrt(squares);
  return out < eps ? eps : out;
}

template <typename T>
void forward(const PredictionLossArgs& args, int64_t begin, int64_t end) {
  const Vectors<T> a(args);
  for (int64_t row = begin; row < end; ++row) {
    const T* target = a.target + row * a.width;
    const double other = length(sums(target, target, a.width).squares, a.eps);
    for (int64_t i = row * a.heads; i < (row + 1) * a.heads; ++i) {
      const Sums of = sums(a.prediction + i * a.width, target, a.width);
      const double own = length(of.squares, a.eps), cosine = of.products / (own * other);
      a.loss[i] = T(2 - 2 * cosine);
      T* stats = a.stats + 3 * i;
      stats[0] = T(own), stats[1] = T(other), stats[2] = T(cosine);
    }
  }
}

template <typename T>
void backward(const PredictionLossArgs& args, int64_t begin, int64_t end) {
  using P = Pack<T>;
  const Vectors<T> a(args);
  const int64_t whole = a.width / P::lanes * P::lanes;
  const int rest = int(a.width - whole);
  for (int64_t i = begin * a.heads; i < end * a.heads; ++i) {
    const T *prediction = a.prediction + i * a.width, *target = a.target + i / a.heads * a.width;
    T* out = a.out + i * a.width;
    const double own = double(a.stats[3 * i]), other = double(a.stats[3 * i + 1]), cosine = double(a.stats[3 * i + 2]);
    const double along_target = -2 * double(a.grad[i]) / own;
    // Of a vector shorter than eps the length is a constant.
    const P p_share = P::fill(own > T(a.eps) ? T(-along_target * cosine / own) : T(0));
    const P t_share = P::fill(T(along_target / other));
    for (int64_t j = 0; j < whole; j += P::lanes) {
      (P::load(prediction + j) * p_share + P::load(target + j) * t_share).store(out + j);
    }
    if (rest) {
      const P p = P::load(prediction + whole, rest, T(0)), t = P::load(target + whole, rest, T(0));
      (p * p_share + t * t_share).store(out + whole, rest);
    }
  }
}

}  // namespace

void prediction_loss_forward(const PredictionLossArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::float64) return forward<double>(args, begin, end);
  forward<float>(args, begin, end);
}

void prediction_loss_backward(const PredictionLossArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::float64) return backward<double>(args, begin, end);
  backward<float>(args, begin, end);
}

}  // namespace matpac::MATPAC_ISA

#ifdef MATPAC_PORTABLE
namespace matpac {

void prediction_loss_cpu(const PredictionLossArgs& args, bool backward, int threads) {
  const auto kernel = backward ? MATPAC_DISPATCH(prediction_loss_backward) : MATPAC_DISPATCH(prediction_loss_forward);
  const int64_t grain = 262144 / (args.heads * args.width + 1) + 1;  // rows, of some 100 us
  parallel_for(args.rows, grain, threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace matpac
#endif
