// Forward in four launches and backward in five; one more each with a padding mask, for the plan of valid tokens, and
// for the option "global" one more forward and two backward. No atomics, no synchronisation with the host: a CUDA graph
// can hold them all.
#pragma once

#include "key_pass_backward.cuh"
#include "query_pass_backward.cuh"
#include "stages.h"

namespace nystrom_ext::cuda {

template <class E, bool kWindow>
class Launcher {
  template <class Plain, class Windowed>
  using Choose = std::conditional_t<kWindow, WithWindow<Windowed>, Plain>;
  using P = typename E::KeyTiles;                                              // key pass
  using Q = Choose<E, typename E::Small>;                                      // queries
  using N = Choose<typename E::Narrow, typename E::NarrowBesideWindow>;        // landmarks, two outputs
  using K = Choose<typename E::Narrowest, typename E::NarrowestBesideWindow>;  // keys, two outputs
  static_assert(K::kOut == N::kOut, "one launch, one number of output tiles");
  using T = typename E::T;
  using A = typename E::Acc;

 public:
  static bool fits(const Problem& p, int shared_memory) {
    const int wide = 2 * ColumnTiles<Q>::kTile, narrow = 2 * ColumnTiles<K>::kTile;
    const int near = WindowMemory<Q>::bytes(p);
    const int needed[] = {
        KeyPass<P>::kShared,      QueryPass<Q>::shared(p) + wide + near, QueryPassBackward<Q>::kShared + wide + near,
        landmark_sweep_shared(p), key_sweep_shared(p) + narrow,          kByLandmarksShared<N>};
    for (const int bytes : needed) {
      if (bytes > shared_memory) return false;
    }
    return true;
  }

  static void forward(Forward f, const Device& device) {
    const Launcher launcher(device);
    launcher.plan(f);
    Stages<T>::landmarks(device, f, E::kLandmarkTile > 0);
    launcher.key_pass(f);
    launcher.query_pass(f);
  }

  static void backward(Backward g, const Device& device) {
    const Launcher launcher(device);
    launcher.plan(g);
    g.lse1 = launcher.allocate<A>(g.wanted.attention() ? queries(g) : 0);
    g.delta1 = launcher.allocate<A>(g.wanted.scores() ? queries(g) : 0);
    if (g.wanted.attention()) launcher.query_pass_backward(g);
    launcher.key_pass_backward(g);
  }

 private:
  const Device& device_;
  explicit Launcher(const Device& device) : device_(device) {}

  template <class X>
  X* allocate(int64_t elements) const {
    return static_cast<X*>(device_.allocate(elements * int64_t(sizeof(X))));
  }

  static int landmark_sweep_shared(const Problem& p) {
    return LandmarkSweep<N>::kShared + (p.extended() ? WindowMemory<N>::kBias : 0);
  }
  static int key_sweep_shared(const Problem& p) {
    const int near = p.window > 0 ? WindowMemory<K>::Stream::kBytes : 0;
    return KeySweep<K>::shared(p) + int(round_up(KeySweep<K>::tap_bytes(p), 16)) + near;
  }

  static int64_t output_tiles(int64_t columns) { return divide_up(columns, Q::kOut); }
  static int64_t output_tiles(const Problem& p) {  // of the sweeps with two outputs
    return divide_up(p.head_dim > p.value_dim ? p.head_dim : p.value_dim, N::kOut);
  }
  static int64_t queries(const Problem& p) { return p.heads * p.queries.all(p.batch); }
  static int64_t row_tiles(int64_t rows) { return divide_up(rows, E::kRows); }

  // Column tiles that stay in shared memory: all, if there is room beside `other` bytes.
  template <class Engine>
  int column_slots(int64_t rows, int other) const {
    if (!Engine::kLandmarkTile) return 1;
    const int64_t bytes = column_bytes<Engine>(1), room = device_.shared_memory - other;
    const int64_t slots = (room < kColumnMemory ? room : kColumnMemory) / bytes, tiles = divide_up(rows, Engine::kCols);
    return int(tiles <= slots ? tiles : 1);
  }
  template <class Engine>
  static int64_t column_bytes(int slots) {
    return int64_t(slots) * 2 * ColumnTiles<Engine>::kTile;
  }

  void plan_side(Tokens& t, const Problem& p, int64_t*& memory) const {
    if (!t.ignored) return;
    memory = allocate<int64_t>(p.batch * (t.landmarks + 2 + t.length));
    t.count = memory;
    t.offsets = memory + p.batch;
    t.index = memory + p.batch * (t.landmarks + 2);
  }
  void plan(Problem& p) const {
    PlanParameters parameters{p, nullptr, nullptr};
    plan_side(p.queries, p, parameters.query_plan);
    plan_side(p.keys, p, parameters.key_plan);
    if (!p.queries.ignored && !p.keys.ignored) return;
    Stages<T>::plan(device_, parameters);
  }

  // Room for Z (`kept` of them) and `count` other matrices, as many in `shared` bytes of each block as there fit.
  CoreMemory core_memory(const Problem& p, int kept, int count, int64_t shared) const {
    CoreMemory memory{};
    memory.kept = kept;
    memory.count = memory.fit = count;
    while (memory.fit > 0 && Core<A>::shared_bytes(p, memory.fit) > shared) --memory.fit;
    memory.z = allocate<A>(p.problems() * kept * matrix_size(p));
    memory.matrices = allocate<A>(p.problems() * (count - memory.fit) * matrix_size(p));
    return memory;
  }

  // Option "global": the coefficients of all heads before any of them is used.
  void coefficients(const Forward& f, CoreMemory& memory) const {
    if (!f.global_coefficient) return;
    memory.coefficients = allocate<A>(f.problems());
    const KeyPassParameters p{f, memory, nullptr, nullptr, nullptr};
    Stages<T>::coefficients(device_, p, Core<A>::shared_bytes(f, memory.fit));
  }

  void key_pass(const Forward& f) const {
    const int64_t parts = f.heads * chunks(f, f.keys).all(), partials = parts * f.queries.landmarks;
    const int64_t blocks = f.problems() + parts * row_tiles(f.queries.landmarks);
    KeyPassParameters p{f, core_memory(f, 1, 5, kCoreMemory), allocate<A>(partials * f.value_width()),
                        allocate<A>(partials), allocate<A>(partials)};
    coefficients(f, p.core);
    const int64_t core = Core<A>::shared_bytes(f, p.core.fit), pass = KeyPass<P>::kShared;
    run(device_, key_pass_and_core<P>, blocks, divide_up(f.value_dim, P::kOut), E::kThreads, core > pass ? core : pass,
        p);
    Stages<T>::finish_core(device_, p, core);
  }

  void query_pass(const Forward& f) const {
    const int own = QueryPass<Q>::shared(f) + WindowMemory<Q>::bytes(f);
    const int slots = column_slots<Q>(f.columns(), own);
    run(device_, cuda::query_pass<Q>, f.heads * row_chunks(f, f.queries).all(), output_tiles(f.value_dim), E::kThreads,
        own + column_bytes<Q>(slots), QueryPassParameters{f, slots});
  }

  void query_pass_backward(const Backward& g) const {
    const int own = QueryPassBackward<Q>::kShared + WindowMemory<Q>::bytes(g);
    const int slots = column_slots<Q>(g.columns(), own);
    const int64_t parts = g.heads * chunks(g, g.queries).all(), partials = parts * g.columns();
    const QueryPassBackwardParameters p{g, slots, allocate<A>(partials * g.value_width()),
                                        allocate<A>(g.wanted.key ? partials * g.head_width() : 0),
                                        allocate<A>(g.extended() && g.wanted.scores() ? queries(g) : 0)};
    run(device_, query_pass_backward_by_queries<Q>, g.heads * row_chunks(g, g.queries).all(),
        g.wanted.query ? output_tiles(g.head_dim) : 1, E::kThreads, own + column_bytes<Q>(slots), p);
    run(device_, query_pass_backward_by_landmarks<N>, parts * row_tiles(g.columns()), output_tiles(g), E::kThreads,
        landmark_sweep_shared(g), p);
    core_backward(p);
  }

  void core_backward(const QueryPassBackwardParameters& sums) const {
    const Backward& g = sums;
    const bool reverse = g.wanted.scores();
    const int kept = reverse ? int(g.iterations) + 1 : 1, count = reverse ? CoreReverse<A>::kMatrices : 5;
    CoreBackwardParameters p{
        g, core_memory(g, kept, count, device_.shared_memory), sums.dw_part, sums.dkt_part, sums.dmissed_rows, nullptr};
    coefficients(g, p.core);
    if (g.global_coefficient) p.dc = allocate<A>(g.problems());
    const int64_t shared = Core<A>::shared_bytes(g, p.core.fit);
    Stages<T>::core_backward(device_, p, shared);
    if (g.global_coefficient && reverse) Stages<T>::coefficient_backward(device_, p, shared);
  }

  void key_pass_backward(const Backward& g) const {
    const int own = key_sweep_shared(g);
    const int slots = column_slots<K>(g.queries.landmarks, own);
    const Wanted& wanted = g.wanted;
    const int64_t tiles = output_tiles(g), parts = wanted.query ? g.heads * chunks(g, g.keys).all() : 0;
    const int64_t key_parts = wanted.tokens() || wanted.conv ? row_chunks(g, g.keys).all() : 0;
    const int64_t key_blocks = g.kv_heads * key_parts;
    const KeyPassBackwardParameters p{g, slots, key_blocks, allocate<A>(parts * g.queries.landmarks * g.head_width()),
                                      allocate<A>(wanted.conv ? g.heads * key_parts * tiles * g.taps : 0)};
    const int64_t by_keys = own + column_bytes<K>(slots), by_landmarks = kByLandmarksShared<N>;
    run(device_, cuda::key_pass_backward<K, N>, key_blocks + parts * row_tiles(g.queries.landmarks), tiles, E::kThreads,
        by_keys > by_landmarks ? by_keys : by_landmarks, p);
    Stages<T>::landmarks_backward(device_, LandmarksBackwardParameters{g, p.dqt_part, p.dconv_part, tiles});
  }
};

template <class E>
struct Launchers {
  using Plain = Launcher<E, false>;
  using Windowed = Launcher<E, E::kTakesWindow>;
  static bool fits(const Problem& p, int shared_memory) {
    if (!p.extended()) return Plain::fits(p, shared_memory);
    return E::kTakesWindow && Windowed::fits(p, shared_memory);
  }
  static void forward(Forward f, const Device& device) {
    f.extended() ? Windowed::forward(f, device) : Plain::forward(f, device);
  }
  static void backward(Backward g, const Device& device) {
    g.extended() ? Windowed::backward(g, device) : Plain::backward(g, device);
  }
};

template <class E>
constexpr Schedule make_schedule() {
  return {Launchers<E>::fits, Launchers<E>::forward, Launchers<E>::backward};
}

}  // namespace nystrom_ext::cuda
