// prototype_loss on the CPU: what follows the matrix products.
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>

#include "../common.h"
#include "isa.h"
#include "pack.h"
#include "threads.h"

namespace matpac {
namespace {

// Rows whose column sums are added up in the rows' own type before the sum goes on in double. Fixed, so that the
// result does not depend on the number of threads.
constexpr int64_t kBlockRows = 16;

}  // namespace
}  // namespace matpac

MATPAC_DECLARE(void prototype_loss_blocks(const PrototypeLossArgs& args, void* columns, void* weights, int64_t begin,
                                          int64_t end))
MATPAC_DECLARE(void prototype_loss_columns(const PrototypeLossArgs& args, const void* columns, int64_t begin,
                                           int64_t end))
MATPAC_DECLARE(void prototype_loss_deltas(const PrototypeLossArgs& args, int64_t begin, int64_t end))

namespace matpac::MATPAC_ISA {
namespace {

template <typename T>
struct Rows {
  const T *student, *teacher, *center;
  T *stats, *loss, *delta;
  int64_t k;
  T scale_s, scale_t;  // log2(e) / temperature: softmax in powers of two
  double inv_temp_s;

  explicit Rows(const PrototypeLossArgs& a)
      : student(static_cast<const T*>(a.student)),
        teacher(static_cast<const T*>(a.teacher)),
        center(static_cast<const T*>(a.center)),
        stats(static_cast<T*>(a.stats)),
        loss(static_cast<T*>(a.loss)),
        delta(static_cast<T*>(a.delta)),
        k(a.k),
        scale_s(T(a.scales[0])),
        scale_t(T(a.scales[1])),
        inv_temp_s(a.scales[0] * M_LN2) {}
};

// One row: loss and statistics. `weights` (k,) receives exp of the teacher's; softmax(teacher) is added to `column`
// (k,) where that is wanted. Where `delta` is wanted it may be the student's logits themselves.
template <typename T>
void forward_row(const Rows<T>& a, int64_t row, T* weights, T* column) {
  using P = Pack<T>;
  constexpr int lanes = P::lanes;
  constexpr int64_t block = 32 * lanes;  // columns summed in T before the sum goes on in double
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  const int64_t k = a.k, whole = k / lanes * lanes;
  const int rest = int(k - whole);
  const T *student = a.student + row * k, *teacher = a.teacher + row * k, *center = a.center;
  T* delta = a.delta ? a.delta + row * k : nullptr;

  P top_s = P::fill(lowest), top_t = P::fill(lowest);
  for (int64_t i = 0; i < whole; i += lanes) {
    top_s = max(P::load(student + i), top_s);
    top_t = max(P::load(teacher + i) - P::load(center + i), top_t);
  }
  if (rest) {
    top_s = max(P::load(student + whole, rest, lowest), top_s);
    top_t = max(P::load(teacher + whole, rest, lowest) - P::load(center + whole, rest, T(0)), top_t);
  }
  const T max_s = top_s.largest(), max_t = top_t.largest();
  const P m_s = P::fill(max_s), m_t = P::fill(max_t), scale_s = P::fill(a.scale_s), scale_t = P::fill(a.scale_t);

  // `dot` sums exp(teacher) * (student - max): all its terms have one sign, so nothing cancels in the loss.
  double sum_s = 0, sum_t = 0, dot = 0;
  for (int64_t start = 0; start < whole; start += block) {
    const int64_t end = start + block < whole ? start + block : whole;
    P part_s = P::fill(T(0)), part_t = part_s, part_dot = part_s;
    for (int64_t i = start; i < end; i += lanes) {
      const P below = P::load(student + i) - m_s;
      const P e_s = exp2(below * scale_s);
      const P e_t = exp2((P::load(teacher + i) - P::load(center + i) - m_t) * scale_t);
      part_s = part_s + e_s;
      part_t = part_t + e_t;
      part_dot = part_dot + e_t * below;
      e_t.store(weights + i);
      if (delta) e_s.store(delta + i);
    }
    sum_s += part_s.sum();
    sum_t += part_t.sum();
    dot += part_dot.sum();
  }
  if (rest) {
    // The lanes past the row hold the maximum and -inf: they add 1 each to sum_s, and nothing to sum_t and dot.
    const P below = P::load(student + whole, rest, max_s) - m_s;
    const P e_s = exp2(below * scale_s);
    const P logit = P::load(teacher + whole, rest, lowest) - P::load(center + whole, rest, T(0));
    const P e_t = exp2((logit - m_t) * scale_t);
    sum_s += e_s.sum() - (lanes - rest);
    sum_t += e_t.sum();
    dot += (e_t * below).sum();
    e_t.store(weights + whole, rest);
    if (delta) e_s.store(delta + whole, rest);
  }

  const T inv_s = T(1 / sum_s), inv_t = T(1 / sum_t);
  a.loss[row] = T(std::log(sum_s) - dot / sum_t * a.inv_temp_s);
  T* stats = a.stats + 4 * row;
  stats[0] = max_s, stats[1] = inv_s, stats[2] = max_t, stats[3] = inv_t;

  if (column && delta) {
    for (int64_t i = 0; i < k; ++i) {
      const T p = weights[i] * inv_t;
      column[i] += p;
      delta[i] = delta[i] * inv_s - p;
    }
  } else if (column) {
    for (int64_t i = 0; i < k; ++i) column[i] += weights[i] * inv_t;
  } else if (delta) {
    for (int64_t i = 0; i < k; ++i) delta[i] = delta[i] * inv_s - weights[i] * inv_t;
  }
}

// softmax(student) - softmax(teacher) of one row, from its statistics.
template <typename T>
void delta_row(const Rows<T>& a, int64_t row) {
  using P = Pack<T>;
  constexpr int lanes = P::lanes;
  const int64_t k = a.k, whole = k / lanes * lanes;
  const int rest = int(k - whole);
  const T *student = a.student + row * k, *teacher = a.teacher + row * k, *center = a.center;
  const T* stats = a.stats + 4 * row;
  T* delta = a.delta + row * k;
  const P m_s = P::fill(stats[0]), inv_s = P::fill(stats[1]), scale_s = P::fill(a.scale_s);
  const P m_t = P::fill(stats[2]), inv_t = P::fill(stats[3]), scale_t = P::fill(a.scale_t);
  for (int64_t i = 0; i < whole; i += lanes) {
    const P q = exp2((P::load(student + i) - m_s) * scale_s) * inv_s;
    const P p = exp2((P::load(teacher + i) - P::load(center + i) - m_t) * scale_t) * inv_t;
    (q - p).store(delta + i);
  }
  if (rest) {
    const P q = exp2((P::load(student + whole, rest, stats[0]) - m_s) * scale_s) * inv_s;
    const P logit = P::load(teacher + whole, rest, stats[2]) - P::load(center + whole, rest, T(0));
    (q - exp2((logit - m_t) * scale_t) * inv_t).store(delta + whole, rest);
  }
}

template <typename T>
void blocks(const PrototypeLossArgs& args, T* columns, T* weights, int64_t begin, int64_t end) {
  const Rows<T> rows(args);
  for (int64_t b = begin; b < end; ++b) {
    T* column = columns ? columns + b * args.k : nullptr;
    if (column) {
      for (int64_t i = 0; i < args.k; ++i) column[i] = T(0);
    }
    const int64_t last = (b + 1) * kBlockRows < args.rows ? (b + 1) * kBlockRows : args.rows;
    for (int64_t row = b * kBlockRows; row < last; ++row) forward_row(rows, row, weights, column);
  }
}

template <typename T>
void columns_sum(const PrototypeLossArgs& args, const T* columns, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < args.rows; row += kBlockRows) {
    const T* column = columns + row / kBlockRows * args.k;
    for (int64_t i = begin; i < end; ++i) args.column_sum[i] += double(column[i]);
  }
}

template <typename T>
void deltas(const PrototypeLossArgs& args, int64_t begin, int64_t end) {
  const Rows<T> rows(args);
  for (int64_t row = begin; row < end; ++row) delta_row(rows, row);
}

}  // namespace

void prototype_loss_blocks(const PrototypeLossArgs& args, void* columns, void* weights, int64_t begin, int64_t end) {
  if (args.dtype == DType::float64) return blocks<double>(args, (double*)columns, (double*)weights, begin, end);
  blocks<float>(args, (float*)columns, (float*)weights, begin, end);
}

void prototype_loss_columns(const PrototypeLossArgs& args, const void* columns, int64_t begin, int64_t end) {
  if (args.dtype == DType::float64) return columns_sum<double>(args, (const double*)columns, begin, end);
  columns_sum<float>(args, (const float*)columns, begin, end);
}

void prototype_loss_deltas(const PrototypeLossArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::float64) return deltas<double>(args, begin, end);
  deltas<float>(args, begin, end);
}

}  // namespace matpac::MATPAC_ISA

#ifdef MATPAC_PORTABLE
namespace matpac {

void prototype_loss_forward_cpu(const PrototypeLossArgs& args, int threads) {
  if (args.rows == 0) return;
  const int64_t size = args.dtype == DType::float64 ? 8 : 4;
  const int64_t count = (args.rows + kBlockRows - 1) / kBlockRows;
  const std::unique_ptr<char[]> weights(new char[size_t(threads * args.k * size)]);
  std::unique_ptr<char[]> columns;
  if (args.column_sum) columns.reset(new char[size_t(count * args.k * size)]);

  const auto kernel = MATPAC_DISPATCH(prototype_loss_blocks);
  std::atomic<int64_t> part{0};
  parallel_for(count, 65536 / (kBlockRows * args.k) + 1, threads, [&](int64_t begin, int64_t end) {
    kernel(args, columns.get(), weights.get() + part++ * args.k * size, begin, end);
  });
  if (args.column_sum) {
    const auto reduce = MATPAC_DISPATCH(prototype_loss_columns);
    parallel_for(args.k, 262144 / count + 1, threads,
                 [&](int64_t begin, int64_t end) { reduce(args, columns.get(), begin, end); });
  }
}

void prototype_loss_delta_cpu(const PrototypeLossArgs& args, int threads) {
  const auto kernel = MATPAC_DISPATCH(prototype_loss_deltas);
  parallel_for(args.rows, 65536 / args.k + 1, threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace matpac
#endif
