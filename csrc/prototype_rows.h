// The CUDA kernels of prototype_loss, written against a Block so that the same source also runs on the host, where
// tests execute it block by block (csrc/cpu/prototype_loss_emulated.cpp). A Block has
//   threads, index, count       threads a block, this block's number and how many there are
//   each(fn)                    fn(me) for every thread of the block; `me` is the thread's State and has an `id`
//   all<Op, n, slot>()          me.reduce[0..n) of every thread becomes the block's, combined by Op in a fixed order
//   shared(), sync()            memory of one double a thread, and the barrier between writing and reading it
// A slot is memory of its own, so that one barrier is enough where two reductions alternate.
#pragma once

#include <cmath>

#include "common.h"

namespace matpac::prototype {

constexpr int kVector = 4;   // columns that a thread loads at once
constexpr int kVectors = 2;  // such loads a row, where the row is held in registers
constexpr int kPerThread = kVector * kVectors;
constexpr int kMaxThreads = 1024, kPassThreads = 512;
constexpr int64_t kMaxInRegisters = int64_t(kPerThread) * kMaxThreads;

template <typename T>
struct Rows {
  const T *student, *teacher, *center;
  T *loss, *stats, *columns;  // columns: (blocks, k), each block's sum of the teacher's probabilities, or null
  void* delta;
  DType delta_dtype;
  int64_t rows, k;
  const double* scales;
  bool aligned;  // every row starts at a multiple of kVector values
};

template <typename T>
Rows<T> rows_of(const PrototypeLossArgs& a, void* columns) {
  return {static_cast<const T*>(a.student),
          static_cast<const T*>(a.teacher),
          static_cast<const T*>(a.center),
          static_cast<T*>(a.loss),
          static_cast<T*>(a.stats),
          static_cast<T*>(columns),
          a.delta,
          a.delta_dtype,
          a.rows,
          a.k,
          a.scales,
          a.k % kVector == 0};
}

// Threads of a block that holds a row of k logits in registers; 0 where the row has to be read in passes instead:
// too long, or of doubles, which would need twice the registers.
template <typename T>
int threads_for(int64_t k) {
  if (sizeof(T) != sizeof(float) || k > kMaxInRegisters) return 0;
  int threads = 128;
  while (int64_t(kPerThread) * threads < k) threads *= 2;
  return threads;
}

struct Max {
  template <typename T>
  static MATPAC_HD T of(T a, T b) {
    return a > b ? a : b;
  }
};

struct Sum {
  template <typename T>
  static MATPAC_HD T of(T a, T b) {
    return a + b;
  }
};

template <typename T>
struct State {
  int id;
  T reduce[3];
};

template <typename T>
struct PassState : State<T> {
  T max_s, max_t;
};

template <typename T>
struct RowState : PassState<T> {
  T student[kPerThread], teacher[kPerThread], column[kPerThread];
  T next_student[kPerThread], next_teacher[kPerThread];
};

template <typename T>
struct alignas(sizeof(T) * kVector) Vector {
  T lane[kVector];
};

// The column of the first of the kVector values that thread `id` loads at turn `v`.
MATPAC_HD int64_t column_of(int v, int threads, int id) { return (int64_t(v) * threads + id) * kVector; }

template <typename T>
MATPAC_HD void load(const T* row, int64_t first, int64_t k, bool aligned, T rest, T* to) {
  if (aligned && first < k) {
    const Vector<T> all = *reinterpret_cast<const Vector<T>*>(row + first);
    for (int i = 0; i < kVector; ++i) to[i] = all.lane[i];
  } else {
    for (int i = 0; i < kVector; ++i) to[i] = first + i < k ? row[first + i] : rest;
  }
}

template <typename To, typename T>
MATPAC_HD void store(To* row, int64_t first, int64_t k, bool aligned, const T* from) {
  if (aligned && first < k) {
    Vector<To> all;
    for (int i = 0; i < kVector; ++i) all.lane[i] = To(from[i]);
    *reinterpret_cast<Vector<To>*>(row + first) = all;
  } else {
    for (int i = 0; i < kVector; ++i) {
      if (first + i < k) row[first + i] = To(from[i]);
    }
  }
}

// kVector logits of the student and of the teacher; -inf past the row.
template <typename T>
MATPAC_HD void load_raw(const Rows<T>& a, int64_t row, int64_t first, T* student, T* teacher) {
  const T lowest = -INFINITY;
  load(a.student + row * a.k, first, a.k, a.aligned, lowest, student);
  load(a.teacher + row * a.k, first, a.k, a.aligned, lowest, teacher);
}

template <typename T>
MATPAC_HD void subtract_center(const Rows<T>& a, int64_t first, T* teacher) {
  T center[kVector];
  load(a.center, first, a.k, a.aligned, T(0), center);
  for (int i = 0; i < kVector; ++i) teacher[i] -= center[i];
}

template <typename T>
MATPAC_HD void load_logits(const Rows<T>& a, int64_t row, int64_t first, T* student, T* teacher) {
  load_raw(a, row, first, student, teacher);
  subtract_center(a, first, teacher);
}

// kVector values of `delta`, or fewer at the end of a row.
template <typename T>
MATPAC_HD void store_delta(const Rows<T>& a, int64_t row, int64_t first, const T* from) {
#ifdef __CUDACC__
  if (sizeof(T) == sizeof(float) && a.delta_dtype == DType::bfloat16)
    return store(static_cast<__nv_bfloat16*>(a.delta) + row * a.k, first, a.k, a.aligned, from);
  if (sizeof(T) == sizeof(float) && a.delta_dtype == DType::float16)
    return store(static_cast<__half*>(a.delta) + row * a.k, first, a.k, a.aligned, from);
#endif
  store(static_cast<T*>(a.delta) + row * a.k, first, a.k, a.aligned, from);
}

MATPAC_HD float power_of_two(float x) { return exp2f(x); }
MATPAC_HD double power_of_two(double x) { return exp2(x); }
MATPAC_HD float natural_log(float x) { return logf(x); }
MATPAC_HD double natural_log(double x) { return log(x); }

// `sums`: of exp(student), of exp(teacher), and of exp(teacher) * (student - max), whose terms all have one sign.
template <typename T>
MATPAC_HD void finish_row(const Rows<T>& a, int64_t row, T max_s, T max_t, const T* sums) {
  T* stats = a.stats + 4 * row;
  stats[0] = max_s;
  stats[1] = T(1) / sums[0];
  stats[2] = max_t;
  stats[3] = T(1) / sums[1];
  a.loss[row] = natural_log(sums[0]) - sums[2] / sums[1] * T(a.scales[0] * M_LN2);
}

// Forward for k <= kPerThread * Block::threads: one read of the logits, which then stay in registers. A block takes
// every count()-th row and keeps its sum of the teacher's probabilities in registers too. The next row's logits are on
// their way while this one's are reduced.
template <typename T, class Block>
MATPAC_HD void forward_in_registers(Block& block, const Rows<T>& a) {
  using Me = RowState<T>;
  const T scale_s = T(a.scales[0]), scale_t = T(a.scales[1]);
  const auto fetch = [&](Me& me, int64_t row) {
    for (int v = 0; v < kVectors; ++v)
      load_raw(a, row, column_of(v, Block::threads, me.id), me.next_student + v * kVector,
               me.next_teacher + v * kVector);
  };
  block.each([&](Me& me) {
    for (int i = 0; i < kPerThread; ++i) me.column[i] = T(0);
    if (block.index() < a.rows) fetch(me, block.index());
  });
  for (int64_t row = block.index(); row < a.rows; row += block.count()) {
    block.each([&](Me& me) {
      T top_s = -INFINITY, top_t = -INFINITY;
      for (int i = 0; i < kPerThread; ++i) {
        me.student[i] = me.next_student[i];
        me.teacher[i] = me.next_teacher[i];
      }
      if (row + block.count() < a.rows) fetch(me, row + block.count());
      for (int v = 0; v < kVectors; ++v)
        subtract_center(a, column_of(v, Block::threads, me.id), me.teacher + v * kVector);
      for (int i = 0; i < kPerThread; ++i) {
        top_s = Max::of(me.student[i], top_s);
        top_t = Max::of(me.teacher[i], top_t);
      }
      me.reduce[0] = top_s;
      me.reduce[1] = top_t;
    });
    block.template all<Max, 2, 0>();
    block.each([&](Me& me) {
      me.max_s = me.reduce[0];
      me.max_t = me.reduce[1];
      T sum_s = 0, sum_t = 0, dot = 0;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t first = column_of(v, Block::threads, me.id);
        for (int i = 0; i < kVector; ++i) {
          T &s = me.student[v * kVector + i], &t = me.teacher[v * kVector + i];
          const T below = s - me.max_s;
          s = power_of_two(below * scale_s);
          t = power_of_two((t - me.max_t) * scale_t);
          sum_s += s;
          sum_t += t;
          // Past the row `below` is -inf and the weight 0: their product would be NaN.
          dot += first + i < a.k ? t * below : T(0);
        }
      }
      me.reduce[0] = sum_s;
      me.reduce[1] = sum_t;
      me.reduce[2] = dot;
    });
    block.template all<Sum, 3, 1>();
    block.each([&](Me& me) {
      const T inv_s = T(1) / me.reduce[0], inv_t = T(1) / me.reduce[1];
      for (int i = 0; i < kPerThread; ++i) {
        const T p = me.teacher[i] * inv_t;
        me.column[i] += p;
        me.student[i] = me.student[i] * inv_s - p;
      }
      if (a.delta) {
        for (int v = 0; v < kVectors; ++v)
          store_delta(a, row, column_of(v, Block::threads, me.id), me.student + v * kVector);
      }
      if (me.id == 0) finish_row(a, row, me.max_s, me.max_t, me.reduce);
    });
  }
  if (!a.columns) return;
  block.each([&](Me& me) {
    for (int v = 0; v < kVectors; ++v)
      store(a.columns + block.index() * a.k, column_of(v, Block::threads, me.id), a.k, a.aligned,
            me.column + v * kVector);
  });
}

// Forward for any k: three passes over a row, which the second-level cache holds.
template <typename T, class Block>
MATPAC_HD void forward_in_passes(Block& block, const Rows<T>& a) {
  using Me = PassState<T>;
  const T scale_s = T(a.scales[0]), scale_t = T(a.scales[1]);
  constexpr int64_t stride = int64_t(Block::threads) * kVector;
  for (int64_t row = block.index(); row < a.rows; row += block.count()) {
    block.each([&](Me& me) {
      T top_s = -INFINITY, top_t = -INFINITY;
      for (int64_t first = column_of(0, Block::threads, me.id); first < a.k; first += stride) {
        T student[kVector], teacher[kVector];
        load_logits(a, row, first, student, teacher);
        for (int i = 0; i < kVector; ++i) {
          top_s = Max::of(student[i], top_s);
          top_t = Max::of(teacher[i], top_t);
        }
      }
      me.reduce[0] = top_s;
      me.reduce[1] = top_t;
    });
    block.template all<Max, 2, 0>();
    block.each([&](Me& me) {
      me.max_s = me.reduce[0];
      me.max_t = me.reduce[1];
      T sum_s = 0, sum_t = 0, dot = 0;
      for (int64_t first = column_of(0, Block::threads, me.id); first < a.k; first += stride) {
        T student[kVector], teacher[kVector];
        load_logits(a, row, first, student, teacher);
        for (int i = 0; i < kVector; ++i) {
          const T below = student[i] - me.max_s;
          const T weight = power_of_two((teacher[i] - me.max_t) * scale_t);
          sum_s += power_of_two(below * scale_s);
          sum_t += weight;
          dot += first + i < a.k ? weight * below : T(0);
        }
      }
      me.reduce[0] = sum_s;
      me.reduce[1] = sum_t;
      me.reduce[2] = dot;
    });
    block.template all<Sum, 3, 1>();
    block.each([&](Me& me) {
      if (me.id == 0) finish_row(a, row, me.max_s, me.max_t, me.reduce);
      if (!a.columns && !a.delta) return;
      const T inv_s = T(1) / me.reduce[0], inv_t = T(1) / me.reduce[1];
      T* column = a.columns ? a.columns + block.index() * a.k : nullptr;
      for (int64_t first = column_of(0, Block::threads, me.id); first < a.k; first += stride) {
        T student[kVector], teacher[kVector], sum[kVector] = {};
        load_logits(a, row, first, student, teacher);
        if (column && row != block.index()) load(column, first, a.k, a.aligned, T(0), sum);
        for (int i = 0; i < kVector; ++i) {
          const T p = power_of_two((teacher[i] - me.max_t) * scale_t) * inv_t;
          sum[i] += p;
          student[i] = power_of_two((student[i] - me.max_s) * scale_s) * inv_s - p;
        }
        if (column) store(column, first, a.k, a.aligned, sum);
        if (a.delta) store_delta(a, row, first, student);
      }
    });
  }
}

// softmax(student) - softmax(teacher) from the statistics, one row a block.
template <typename T, class Block>
MATPAC_HD void delta_row(Block& block, const Rows<T>& a) {
  const int64_t row = block.index();
  const T* stats = a.stats + 4 * row;
  const T scale_s = T(a.scales[0]), scale_t = T(a.scales[1]);
  block.each([&](State<T>& me) {
    for (int64_t first = column_of(0, Block::threads, me.id); first < a.k; first += Block::threads * kVector) {
      T student[kVector], teacher[kVector];
      load_logits(a, row, first, student, teacher);
      for (int i = 0; i < kVector; ++i) teacher[i] = power_of_two((teacher[i] - stats[2]) * scale_t) * stats[3];
      for (int i = 0; i < kVector; ++i)
        student[i] = power_of_two((student[i] - stats[0]) * scale_s) * stats[1] - teacher[i];
      store_delta(a, row, first, student);
    }
  });
}

// column_sum += the sum of `columns` (blocks, k): kColumns columns a block, its threads taking turns at the blocks.
constexpr int kColumns = 32, kSumThreads = 256;

template <typename T, class Block>
MATPAC_HD void sum_columns(Block& block, const T* columns, int64_t blocks, int64_t k, double* column_sum) {
  constexpr int turns = kSumThreads / kColumns;
  block.each([&](State<T>& me) {
    const int64_t c = block.index() * kColumns + me.id % kColumns;
    double sum = 0;
    for (int64_t b = me.id / kColumns; c < k && b < blocks; b += turns) sum += double(columns[b * k + c]);
    block.shared()[me.id] = sum;
  });
  block.sync();
  block.each([&](State<T>& me) {
    const int64_t c = block.index() * kColumns + me.id;
    if (me.id >= kColumns || c >= k) return;
    double sum = 0;
    for (int turn = 0; turn < turns; ++turn) sum += block.shared()[turn * kColumns + me.id];
    column_sum[c] += sum;
  });
}

}  // namespace matpac::prototype
