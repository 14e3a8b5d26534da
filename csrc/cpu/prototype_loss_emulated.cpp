// The CUDA kernels of prototype_loss on the host, block by block and in the device's order of summation. For tests on
// machines without a GPU: the index arithmetic and the row arithmetic are the very source that nvcc compiles.
#include <vector>

#include "../prototype_rows.h"

namespace matpac {
namespace {

using namespace prototype;

template <class StateT, int kThreads>
class HostBlock {
 public:
  static constexpr int threads = kThreads;

  HostBlock(int64_t index, int64_t count) : index_(index), count_(count), state_(kThreads), memory_(kThreads) {
    for (int id = 0; id < kThreads; ++id) state_[size_t(id)].id = id;
  }
  int64_t index() const { return index_; }
  int64_t count() const { return count_; }

  template <class Fn>
  void each(const Fn& fn) {
    for (StateT& me : state_) fn(me);
  }

  template <class Op, int n, int slot>
  void all() {
    for (int i = 0; i < n; ++i) {
      std::vector<decltype(state_[0].reduce[0] + 0)> value;
      for (const StateT& me : state_) value.push_back(me.reduce[i]);
      butterfly<Op>(value, 32);
      for (int warp = 0; warp < kThreads / 32; ++warp) value[size_t(warp)] = value[size_t(warp) * 32];
      value.resize(kThreads / 32);
      butterfly<Op>(value, kThreads / 32);
      for (StateT& me : state_) me.reduce[i] = value[0];
    }
  }

  double* shared() { return memory_.data(); }
  void sync() {}

 private:
  // What xor shuffles over lanes of groups of `width` leave in every lane.
  template <class Op, typename T>
  static void butterfly(std::vector<T>& value, int width) {
    for (int offset = width / 2; offset; offset /= 2) {
      const std::vector<T> before = value;
      for (size_t i = 0; i < value.size(); ++i) value[i] = Op::of(before[i], before[i ^ size_t(offset)]);
    }
  }

  int64_t index_, count_;
  std::vector<StateT> state_;
  std::vector<double> memory_;
};

template <class StateT, int kThreads, class Body>
void grid(int64_t blocks, const Body& body) {
  for (int64_t index = 0; index < blocks; ++index) {
    HostBlock<StateT, kThreads> block(index, blocks);
    body(block);
  }
}

template <typename T, int kThreads>
void in_registers(const Rows<T>& rows, int blocks) {
  grid<RowState<T>, kThreads>(blocks, [&](auto& block) { forward_in_registers(block, rows); });
}

template <typename T>
void forward(const PrototypeLossArgs& args, void* columns, int blocks) {
  const Rows<T> rows = rows_of<T>(args, args.column_sum ? columns : nullptr);
  const int threads = threads_for<T>(args.k);
  if (threads == 128) in_registers<T, 128>(rows, blocks);
  if (threads == 256) in_registers<T, 256>(rows, blocks);
  if (threads == 512) in_registers<T, 512>(rows, blocks);
  if (threads == 1024) in_registers<T, 1024>(rows, blocks);
  if (threads == 0) grid<PassState<T>, kPassThreads>(blocks, [&](auto& block) { forward_in_passes(block, rows); });
  if (!args.column_sum) return;
  grid<State<T>, kSumThreads>((args.k + kColumns - 1) / kColumns,
                              [&](auto& block) { sum_columns(block, rows.columns, blocks, args.k, args.column_sum); });
}

template <typename T>
void delta(const PrototypeLossArgs& args) {
  grid<State<T>, kSumThreads>(args.rows, [&](auto& block) { delta_row(block, rows_of<T>(args, nullptr)); });
}

}  // namespace

void prototype_loss_forward_emulated(const PrototypeLossArgs& args, void* columns, int blocks) {
  args.dtype == DType::float64 ? forward<double>(args, columns, blocks) : forward<float>(args, columns, blocks);
}

void prototype_loss_delta_emulated(const PrototypeLossArgs& args) {
  args.dtype == DType::float64 ? delta<double>(args) : delta<float>(args);
}

}  // namespace matpac
