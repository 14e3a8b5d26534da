// A float32 matrix's transpose and the sums of its columns, in one pass over it: what the gradients of a linear layer's
// weight and bias are made of (ops/_onednn.py).
#include "../ops.h"
#include "bfloat16.h"
#include "isa.h"
#include "threads.h"

MATPAC_DECLARE(void transposed(const TransposedArgs& args, int64_t begin, int64_t end))

namespace matpac {
namespace {
constexpr int64_t kPanel = 32;  // columns that are done together: as many rows of the result are open at a time
}
}  // namespace matpac

namespace matpac::MATPAC_ISA {
namespace {

constexpr int64_t kRows = 64;  // that are summed in float32 before they are added to the rest in float64

// Columns j to j + width of rows i to i + count, turned; their sums are added to `sums`, in an order that is the same
// for every instruction set.
MATPAC_INLINE void block(const TransposedArgs& a, int64_t i, int64_t count, int64_t j, int64_t width, double* sums) {
  float here[kPanel] = {};
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) {
    const float* x = a.x + (i + r) * a.width + j;
    float* out = a.out + j * a.rows + i + r;
    for (int64_t k = turn_four(x, a.width, width, out, a.rows); k < width; ++k) {
      for (int64_t q = 0; q < 4; ++q) out[k * a.rows + q] = x[q * a.width + k];
    }
    for (int64_t k = 0; k < width; ++k) {
      here[k] += (x[k] + x[k + a.width]) + (x[k + 2 * a.width] + x[k + 3 * a.width]);
    }
  }
  for (; r < count; ++r) {
    const float* x = a.x + (i + r) * a.width + j;
    for (int64_t k = 0; k < width; ++k) {
      a.out[(j + k) * a.rows + i + r] = x[k];
      here[k] += x[k];
    }
  }
  for (int64_t k = 0; k < width; ++k) sums[k] += here[k];
}

}  // namespace

// Of the panels those from `begin` to `end`.
void transposed(const TransposedArgs& a, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t j = panel * kPanel, width = a.width - j < kPanel ? a.width - j : kPanel;
    double sums[kPanel] = {};
    for (int64_t i = 0; i < a.rows; i += kRows) block(a, i, a.rows - i < kRows ? a.rows - i : kRows, j, width, sums);
    for (int64_t k = 0; k < width; ++k) a.sums[j + k] = float(sums[k]);
  }
}

}  // namespace matpac::MATPAC_ISA

#ifdef MATPAC_PORTABLE
namespace matpac {

void transposed_cpu(const TransposedArgs& args, int threads) {
  const auto kernel = MATPAC_DISPATCH(transposed);
  const int64_t panels = (args.width + kPanel - 1) / kPanel;
  const int64_t grain = 1 + (1 << 18) / (args.rows * kPanel + 1);  // some 100 us to a thread
  parallel_for(panels, grain, threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace matpac
#endif
