// A whole step of the model in one parallel region. The threads share the work of one phase after the other: matrices by
// strips, attention by heads, and between them what belongs to single tokens (norms, rotary positions, routing). Of few
// tokens the last thread to finish a phase does this at once, while the others have their next weights on the way.
#include <new>
#include <string.h>
#include <time.h>

#include "attention.h"
#include "blockffn.h"
#include "dispatch.h"
#include "embedding.h"
#include "ranking.h"
#include "screening.h"
#include "sparse_ffn.h"

namespace {

using namespace blockffn;

constexpr int64_t kFewTokens = 2;
constexpr int64_t kRun = 16;  // strips whose sums are used before they have left the first cache
constexpr int64_t kAhead = 64 << 10;  // bytes of the next phase that memory delivers while threads wait for each other

// A matrix whose strips the threads share.
struct Product {
  Strips strips;
  const uint8_t* data;
  Share share;

  explicit Product(const blockffn_matrix& matrix) : strips(matrix), data(matrix.data) {}
  const uint8_t* at(int64_t strip) const { return data + strip * strips.bytes; }
  Stretch take(int64_t threads) { return share.take(strips.count(), threads, shortest_stretch(strips.bytes)); }
  // The first stretch of a thread, on its way from memory.
  Stretch begin(int64_t threads) {
    const Stretch stretch = take(threads);
    const int64_t bytes = (stretch.end - stretch.begin) * strips.bytes;
    if (!stretch.empty()) start_reading(at(stretch.begin), bytes < kAhead ? bytes : kAhead);
    return stretch;
  }
};

struct LayerWork {
  Product in, query, out, router;
  Counter attention_tasks;
  Counter stored, attended, normalized, finished;  // tokens of the stages between phases
  SparseFfn ffn;

  LayerWork(const Kernels& isa, const blockffn_layer& layer, int64_t num_tokens, int64_t num_threads)
      : in(layer.in_proj),
        query(layer.query_proj),
        out(layer.out_proj),
        router(layer.router),
        ffn(isa, layer.experts, num_tokens, num_threads) {}
};

// Adds the time of one thread to the parts that it was spent on.
class Clock {
 public:
  explicit Clock(double* seconds) : seconds_(seconds), last_(seconds ? now() : 0) {}
  void add_to(int part) {
    if (!seconds_) return;
    const double time = now();
    seconds_[part] += time - last_;
    last_ = time;
  }

 private:
  static double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
  }
  double* const seconds_;
  double last_;
};

struct Worker {
  int64_t index;
  int64_t num_threads;
  Clock clock;
};

class DecodeStep {
 public:
  DecodeStep(const blockffn_model& model, const blockffn_step& step, const Positions& positions)
      : model_(model),
        step_(step),
        isa_(kernels()),
        num_tokens_(positions.num_tokens),
        most_threads_(num_threads() < model.max_threads ? num_threads() : model.max_threads),
        attention_(model, isa_, positions, most_threads_),
        positions_(positions),
        fusion_(model.fusion),
        head_(model.head),
        screen_(model.screen),
        ranking_(isa_, step),
        choosing_(step),
        screening_(isa_, model, step) {}

  // Plans the memory; returns how many bytes it takes.
  int64_t reserve() {
    const int64_t T = num_tokens_;
    int64_t in_row = larger(head_.strips.activation_bytes(), fusion_.strips.activation_bytes()), out_row = screen_.strips.activation_bytes(), in = fusion_.strips.padded_outputs(), query = 0, out = 0, router = 0, experts = 0, ffn = 0;
    for (int64_t i = 0; i < model_.num_layers; ++i) {
      LayerWork work(isa_, model_.layers[i], T, most_threads_);
      in_row = larger(in_row, larger(work.in.strips.activation_bytes(), work.ffn.up().activation_bytes()));
      out_row = larger(out_row, larger(work.out.strips.activation_bytes(), work.router.strips.activation_bytes()));
      out_row = larger(out_row, work.query.strips.activation_bytes());
      in = larger(in, work.in.strips.padded_outputs());
      query = larger(query, work.query.strips.padded_outputs());
      out = larger(out, work.out.strips.padded_outputs());
      router = larger(router, work.router.strips.padded_outputs());
      experts = larger(experts, model_.layers[i].experts.num_experts);
      Workspace pieces;
      work.ffn.reserve(pieces, T * model_.layers[i].experts.num_experts);
      ffn = larger(ffn, pieces.size());
    }
    floats_ = round_up(larger(2 * model_.hidden_size, larger(model_.query_latent_size, Cache::key_width(model_))), 16);
    at_layers_ = memory_.reserve(model_.num_layers * static_cast<int64_t>(sizeof(LayerWork)));
    at_x_ = memory_.reserve(T * model_.hidden_size * 4);
    at_floats_ = memory_.reserve(T * floats_ * 4);
    at_in_rows_ = memory_.reserve(T * in_row);
    at_out_rows_ = memory_.reserve(T * out_row);
    at_in_ = memory_.reserve(T * in * 4);
    at_query_ = memory_.reserve(T * query * 4);
    at_attended_ = memory_.reserve(T * attended_width() * 4);
    at_out_ = memory_.reserve(T * out * 4);
    at_router_ = memory_.reserve(T * router * 4);
    at_weights_ = memory_.reserve(T * experts * 4);
    most_experts_ = experts;
    at_ffn_ = memory_.reserve(ffn);
    attention_.reserve(memory_, most_threads_);
    ranking_.reserve(memory_, model_.head.outputs);
    choosing_.reserve(memory_, model_.head.outputs);
    screening_.reserve(memory_);
    return memory_.size();
  }

  void run() {
    reserve();
    memory_.borrow(step_.workspace);
    layers_ = memory_.at<LayerWork>(at_layers_);
    for (int64_t i = 0; i < model_.num_layers; ++i) {
      LayerWork* work = new (layers_ + i) LayerWork(isa_, model_.layers[i], num_tokens_, most_threads_);
      Workspace pieces;
      work->ffn.reserve(pieces, num_tokens_ * model_.layers[i].experts.num_experts);
      pieces.borrow(memory_.at<uint8_t>(at_ffn_));
      work->ffn.use(pieces);
    }
    x_ = memory_.at<float>(at_x_);
    in_rows_ = memory_.at<uint8_t>(at_in_rows_);
    out_rows_ = memory_.at<uint8_t>(at_out_rows_);
    in_ = memory_.at<float>(at_in_);
    query_ = memory_.at<float>(at_query_);
    attended_ = memory_.at<float>(at_attended_);
    out_ = memory_.at<float>(at_out_);
    router_ = memory_.at<float>(at_router_);
    weights_ = memory_.at<float>(at_weights_);
    attention_.use(memory_);
    ranking_.use(memory_);
    choosing_.use(memory_);
    screening_.use(memory_);
    run_on_threads([](void* self) { static_cast<DecodeStep*>(self)->on_each_thread(); }, this, most_threads_);
    if (step_.num_strips) *step_.num_strips = step_.num_exact ? screening_.num_read() : head_.strips.count();
  }

 private:
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
  bool is_latent() const { return model_.attention == BLOCKFFN_LATENT; }
  int64_t attended_width() const { return model_.num_heads * model_.value_width; }
  float* floats(int64_t token) const { return memory_.at<float>(at_floats_) + token * floats_; }

  void on_each_thread() {
    const int64_t index = __atomic_fetch_add(&joined_, 1, __ATOMIC_RELAXED);
    wait_for_all();
    Worker worker{index, __atomic_load_n(&joined_, __ATOMIC_RELAXED), Clock(index == 0 ? step_.seconds : nullptr)};
    Stretch ahead = model_.fusion.data ? fuse(worker) : layers_[0].in.begin(worker.num_threads);
    for_each_token(worker, embedded_, [&](int64_t t) {
      if (model_.fusion.data)
        take_fused(t);
      else
        embed(model_, step_.tokens[t], x_ + t * model_.hidden_size);
      prepare_layer(0, t);
    });
    for (int64_t i = 0; i < model_.num_layers; ++i) {
      ahead = attend(worker, i, ahead);
      ahead = feed_forward(worker, i, ahead);
    }
    if (step_.num_exact)
      screen(worker, ahead);
    else
      multiply(worker, head_, ahead, in_rows_, step_.num_logits, step_.logits, [](int64_t, int64_t) {});
    worker.clock.add_to(BLOCKFFN_HEAD);
    if (step_.num_best) {
      meet(worker, [] {});
      ranking_.rank_pieces();
      meet(worker, [&] { ranking_.merge(); });
    }
    if (step_.choices && !step_.num_exact) {
      meet(worker, [] {});
      choosing_.choose_in_pieces();
      worker.clock.add_to(BLOCKFFN_HEAD);
      meet(worker, [&] { choosing_.merge(); });
    }
    worker.clock.add_to(BLOCKFFN_HEAD);
  }

  // The head's largest logits, see screening.h.
  void screen(Worker& worker, Stretch ahead) {
    const auto row = [&](int64_t i) { return in_rows_ + i * head_.strips.activation_bytes(); };
    multiply(worker, screen_, ahead, out_rows_, step_.num_logits, step_.logits,
             [&](int64_t begin, int64_t end) { screening_.bound(begin, end); });
    worker.clock.add_to(BLOCKFFN_HEAD);
    meet(worker, [&] { screening_.choose(); });
    screening_.read_chosen(row);
    worker.clock.add_to(BLOCKFFN_HEAD);
    meet(worker, [&] { screening_.set_bars(); });
    screening_.read_rest(row);
    if (!step_.choices) return;
    worker.clock.add_to(BLOCKFFN_HEAD);
    meet(worker, [&] { screening_.choose_outputs(); });
  }

  // fusion * [norm(embedding), norm(state)] of a draft model.
  Stretch fuse(Worker& worker) {
    const int64_t D = model_.hidden_size;
    const Stretch ahead = fusion_.begin(worker.num_threads);
    for_each_token(worker, read_, [&](int64_t t) {
      float* both = floats(t);
      embed(model_, step_.tokens[t], both);
      isa_.normalize(both, model_.embedding_norm, model_.norm_eps, 1, D, both);
      isa_.normalize(step_.states + t * D, model_.state_norm, model_.norm_eps, 1, D, both + D);
      prepare(fusion_.strips, both, 2 * D, t, in_rows_);
    });
    multiply(worker, fusion_, ahead, in_rows_, num_tokens_, in_, [](int64_t, int64_t) {});
    worker.clock.add_to(BLOCKFFN_PROJECTIONS);
    return layers_[0].in.begin(worker.num_threads);
  }
  void take_fused(int64_t token) const {
    const int64_t D = model_.hidden_size;
    const float* sums = in_ + token * fusion_.strips.padded_outputs();
    for (int64_t k = 0; k < D; ++k) x_[token * D + k] = sums[k] + model_.fusion_bias[k];
  }

  // x += s * out_proj(attention(...)). Each phase gets its first stretch from the one before and returns the next one's.
  Stretch attend(Worker& worker, int64_t index, Stretch ahead) {
    const blockffn_layer& layer = model_.layers[index];
    LayerWork& work = layers_[index];
    const int64_t threads = worker.num_threads;
    multiply(worker, work.in, ahead, in_rows_, num_tokens_, in_, [](int64_t, int64_t) {});
    if (is_latent()) ahead = work.query.begin(threads);
    worker.clock.add_to(BLOCKFFN_PROJECTIONS);
    share(worker, work.stored, num_store_tasks(), [&](int64_t task) { store(index, task); });
    int64_t task = work.attention_tasks.take();
    if (is_latent()) {
      multiply(worker, work.query, ahead, out_rows_, num_tokens_, query_, [](int64_t, int64_t) {});
      attention_.begin(layer, task);
      worker.clock.add_to(BLOCKFFN_PROJECTIONS);
      meet(worker, [] {});
    }
    const Strips& queries = is_latent() ? work.query.strips : work.in.strips;
    const Attention::Job job{&layer, index, is_latent() ? query_ : in_, queries.padded_outputs(), attended_, attended_width()};
    for (; task < attention_.num_tasks(); task = work.attention_tasks.take()) attention_.run(job, task, worker.index);
    ahead = work.out.begin(threads);
    worker.clock.add_to(BLOCKFFN_ATTENTION);
    for_each_token(worker, work.attended, [&](int64_t t) {
      prepare(work.out.strips, attended_ + t * attended_width(), attended_width(), t, out_rows_);
    });
    multiply(worker, work.out, ahead, out_rows_, num_tokens_, out_, [&](int64_t begin, int64_t end) {
      for (int64_t t = 0; t < num_tokens_; ++t)
        add_to_residual(t, begin, end, out_ + t * work.out.strips.padded_outputs() + begin);
    });
    if (layer.router.data) ahead = work.router.begin(threads);
    worker.clock.add_to(BLOCKFFN_PROJECTIONS);
    return ahead;
  }

  // x += s * ffn(norm(x)).
  Stretch feed_forward(Worker& worker, int64_t index, Stretch ahead) {
    const blockffn_layer& layer = model_.layers[index];
    LayerWork& work = layers_[index];
    for_each_token(worker, work.normalized, [&](int64_t t) { prepare_ffn(index, t); });
    if (layer.router.data) {
      multiply(worker, work.router, ahead, out_rows_, num_tokens_, router_, [](int64_t, int64_t) {});
      worker.clock.add_to(BLOCKFFN_ROUTER);
    }
    meet(worker, [&] { route(index); });
    const Stretch outputs = work.ffn.compute_hidden();
    worker.clock.add_to(BLOCKFFN_FFN);
    meet(worker, [] {});
    work.ffn.compute_outputs(outputs, [&](int64_t token, int64_t begin, int64_t end, const float* sums) {
      add_to_residual(token, begin, end, sums);
    });
    const bool is_last = index + 1 == model_.num_layers;
    ahead = is_last ? (step_.num_exact ? screen_ : head_).begin(worker.num_threads) : layers_[index + 1].in.begin(worker.num_threads);
    worker.clock.add_to(BLOCKFFN_FFN);
    for_each_token(worker, work.finished, [&](int64_t t) {
      if (is_last)
        prepare_head(t);
      else
        prepare_layer(index + 1, t);
    });
    return ahead;
  }

  // sums[i][0 .. padded outputs) = product * row i. done(begin, end) follows on outputs begin .. end - 1 of all rows.
  template <typename Done>
  void multiply(const Worker& worker, Product& product, Stretch stretch, const uint8_t* rows, int64_t num_rows, float* sums,
                Done done) {
    const int64_t row_bytes = product.strips.activation_bytes(), stride = product.strips.padded_outputs();
    for (Stretch next; !stretch.empty(); stretch = next) {
      next = product.take(worker.num_threads);
      const Reading reading = Reading::from_to(product.at(stretch.end), next.empty() ? nullptr : product.at(next.begin));
      for (int64_t begin = stretch.begin, end; begin < stretch.end; begin = end) {
        end = begin + kRun < stretch.end ? begin + kRun : stretch.end;
        multiply_strips(
            isa_, product.strips, product.at(begin), end - begin, num_rows, false, reading,
            [&](int64_t i) { return rows + i * row_bytes; },
            [&](int64_t i) { return sums + i * stride + begin * kStrip; });
        done(begin * kStrip, end * kStrip < product.strips.outputs ? end * kStrip : product.strips.outputs);
      }
    }
  }

  // When all threads have come: work(task) for all tasks, and when that is done all go on.
  template <typename Work>
  void share(Worker& worker, Counter& counter, int64_t num_tasks, Work work) {
    if (num_tokens_ <= kFewTokens) {
      meet(worker, [&] {
        for (int64_t task = 0; task < num_tasks; ++task) work(task);
      });
      return;
    }
    meet(worker, [] {});
    for (int64_t task; (task = counter.take()) < num_tasks;) work(task);
    meet(worker, [] {});
  }
  template <typename Work>
  void for_each_token(Worker& worker, Counter& counter, Work work) {
    share(worker, counter, num_tokens_, work);
  }

  template <typename Work>
  void meet(Worker& worker, Work last) {
    meeting_.wait(worker.num_threads, last);
    worker.clock.add_to(BLOCKFFN_BETWEEN);
  }

  void prepare(const Strips& strips, const float* values, int64_t count, int64_t row, uint8_t* rows) const {
    isa_.prepare[strips.format](values, count, strips.inputs, strips.group, rows + row * strips.activation_bytes());
  }
  void normalize(const float* x, const float* weight, float* out) const {
    if (weight)
      isa_.normalize(x, weight, model_.norm_eps, 1, model_.hidden_size, out);
    else
      memcpy(out, x, static_cast<size_t>(model_.hidden_size) * 4);
  }
  void prepare_layer(int64_t index, int64_t token) const {
    const int64_t D = model_.hidden_size;
    normalize(x_ + token * D, model_.layers[index].attention_norm, floats(token));
    prepare(layers_[index].in.strips, floats(token), D, token, in_rows_);
  }
  void prepare_ffn(int64_t index, int64_t token) const {
    const int64_t D = model_.hidden_size;
    isa_.normalize(x_ + token * D, model_.layers[index].ffn_norm, model_.norm_eps, 1, D, floats(token));
    prepare(layers_[index].ffn.up(), floats(token), D, token, in_rows_);
    if (model_.layers[index].router.data) prepare(layers_[index].router.strips, floats(token), D, token, out_rows_);
  }
  void prepare_head(int64_t token) const {
    const int64_t D = model_.hidden_size, row = token - (num_tokens_ - step_.num_logits);
    float* hidden = step_.hidden + token * D;
    normalize(x_ + token * D, model_.final_norm, hidden);
    if (row < 0) return;
    for (int64_t k = 0; k < D; ++k) floats(token)[k] = hidden[k] * model_.head_scale;
    prepare(head_.strips, floats(token), D, row, in_rows_);
    if (!step_.num_exact) return;
    prepare(screen_.strips, floats(token), D, row, out_rows_);
    screening_.measure(row, floats(token), D, in_rows_ + row * head_.strips.activation_bytes(),
                       out_rows_ + row * screen_.strips.activation_bytes());
  }

  void add_to_residual(int64_t token, int64_t begin, int64_t end, const float* sums) const {
    float* x = x_ + token * model_.hidden_size + begin;
    for (int64_t i = 0; i < end - begin; ++i) x[i] += model_.residual_scale * sums[i];
  }

  // Between the first product and attention: for each head the keys and values of positions that lie together in the cache,
  // then for latent attention the queries' latents, token by token.
  int64_t num_store_tasks() const {
    return model_.num_key_heads * Cache::num_blocks(positions_.row(0), num_tokens_) + (is_latent() ? num_tokens_ : 0);
  }
  void store(int64_t index, int64_t task) const {
    const int64_t first = positions_.row(0), blocks = Cache::num_blocks(first, num_tokens_);
    const int64_t head = task / blocks, block = task % blocks;
    if (head >= model_.num_key_heads) return prepare_query(index, task - model_.num_key_heads * blocks);
    const int64_t begin = larger(Cache::begin_of_block(first, block) - first, 0);
    const int64_t end = Cache::begin_of_block(first, block + 1) - first;
    for (int64_t t = begin; t < end && t < num_tokens_; ++t) store_position(index, head, t);
  }

  void store_position(int64_t index, int64_t head, int64_t token) const {
    const blockffn_layer& layer = model_.layers[index];
    float* key = in_ + token * layers_[index].in.strips.padded_outputs();
    const float* value;
    if (is_latent()) {
      key += round_up(model_.query_latent_size, kStrip);
      isa_.normalize(key, layer.latent_norm, model_.latent_norm_eps, 1, model_.latent_size, key);
      rotate(model_, positions_.of(token), key + model_.latent_size, 1, key + model_.latent_size);
      value = key;
    } else {
      key += round_up(model_.num_heads * model_.rope_width, kStrip);
      value = key + round_up(model_.num_key_heads * model_.rope_width, kStrip) + head * model_.value_width;
      key += head * model_.rope_width;
      rotate(model_, positions_.of(token), key, 1, key);
    }
    attention_.cache().write(index, head, positions_.row(token), key, value);
  }

  void prepare_query(int64_t index, int64_t token) const {
    const LayerWork& work = layers_[index];
    const float* row = in_ + token * work.in.strips.padded_outputs();
    isa_.normalize(row, model_.layers[index].query_norm, model_.latent_norm_eps, 1, model_.query_latent_size, floats(token));
    prepare(work.query.strips, floats(token), model_.query_latent_size, token, out_rows_);
  }

  // From the router's outputs to the active pairs and their counts.
  void route(int64_t index) const {
    const blockffn_layer& layer = model_.layers[index];
    LayerWork& work = layers_[index];
    const int64_t E = layer.experts.num_experts;
    for (int64_t t = 0; t < num_tokens_; ++t) {
      float* weights = weights_ + t * E;
      if (layer.router.data)
        routing_weights(layer, router_ + t * work.router.strips.padded_outputs(), weights);
      else
        weights[0] = 1;
    }
    const RoutingWeights routing{weights_, E, num_tokens_, E, layer.threshold};
    work.ffn.begin(routing, in_rows_);
    step_.num_union[index] = work.ffn.num_union();
    for (int64_t t = 0; t < num_tokens_; ++t) {
      int64_t& count = step_.num_active[index * num_tokens_ + t] = 0;
      uint8_t* marks = step_.is_active ? step_.is_active + (index * num_tokens_ + t) * most_experts_ : nullptr;
      for (int64_t e = 0; e < E; ++e) {
        const bool is_active = routing.is_active(t, e);
        count += is_active;
        if (marks) marks[e] = is_active;
      }
    }
  }

  void routing_weights(const blockffn_layer& layer, const float* logits, float* weights) const {
    const int64_t E = layer.experts.num_experts;
    float squares = 0;
    for (int64_t e = 0; e < E; ++e) {
      weights[e] = logits[e] < 0 ? 0 : logits[e];  // NaN stays, so that it is seen
      squares += weights[e] * weights[e];
    }
    const float factor =
        layer.router_normalizes ? 1 / __builtin_sqrtf(squares / static_cast<float>(E) + layer.router_eps) : 1;
    for (int64_t e = 0; e < E; ++e) weights[e] *= factor * (layer.router_scale ? layer.router_scale[e] : 1);
  }

  const blockffn_model& model_;
  const blockffn_step& step_;
  const Kernels& isa_;
  const int64_t num_tokens_;
  const int64_t most_threads_;
  Attention attention_;
  const Positions& positions_;
  Product fusion_;
  Product head_;
  Product screen_;
  Ranking ranking_;
  Choosing choosing_;
  Screening screening_;
  Counter read_, embedded_;
  Meeting meeting_;
  int64_t joined_ = 0;

  Workspace memory_;
  int64_t floats_ = 0, most_experts_ = 0;
  int64_t at_layers_ = 0, at_x_ = 0, at_floats_ = 0, at_in_rows_ = 0, at_out_rows_ = 0, at_in_ = 0, at_query_ = 0,
          at_attended_ = 0, at_out_ = 0, at_router_ = 0, at_weights_ = 0, at_ffn_ = 0;
  LayerWork* layers_ = nullptr;
  float* x_ = nullptr;           // [tokens][hidden size], the residual stream
  uint8_t* in_rows_ = nullptr;   // tokens prepared for in_proj, the experts or the head
  uint8_t* out_rows_ = nullptr;  // tokens prepared for query_proj, out_proj or the router
  float* in_ = nullptr;          // what these products give, [tokens][padded outputs]
  float* query_ = nullptr;
  float* attended_ = nullptr;
  float* out_ = nullptr;
  float* router_ = nullptr;
  float* weights_ = nullptr;  // [tokens][experts]
};

bool is_valid(const blockffn_model& model, const blockffn_step& step) {
  if (step.num_tokens < 1 || step.num_tokens > BLOCKFFN_MAX_STEP || step.length < 0) return false;
  if (step.num_logits < 0 || step.num_logits > step.num_tokens) return false;
  if (step.num_earlier < 0 || step.num_earlier + step.num_tokens > BLOCKFFN_MAX_STEP) return false;
  if (step.length + step.num_earlier + step.num_tokens > model.capacity) return false;
  if (step.num_best < 0 || step.num_best > BLOCKFFN_MAX_BEST || step.num_best > model.head.outputs) return false;
  if (step.num_exact < 0 || step.num_exact > BLOCKFFN_MAX_BEST || step.num_exact > model.head.outputs) return false;
  if (step.num_exact && (step.num_best || !model.screen.data)) return false;
  if (step.choices && step.num_best) return false;
  if (model.fusion.data && !step.states) return false;
  for (int64_t t = 0; t < step.num_tokens; ++t)
    if (step.tokens[t] < 0 || step.tokens[t] >= model.vocab_size) return false;
  return true;
}

}  // namespace

extern "C" int32_t blockffn_decode_step(const blockffn_model* model, const blockffn_step* step) {
  Positions positions;
  if (!is_valid(*model, *step) || !positions.set(*step)) return BLOCKFFN_BAD_ARGUMENT;
  DecodeStep(*model, *step, positions).run();
  return BLOCKFFN_OK;
}

extern "C" int32_t blockffn_draft_chain(const blockffn_model* model, const blockffn_step* first, int64_t count, float least,
                                        const int64_t* token_ids, int64_t* outputs, float* log_probs,
                                        int64_t* num_drafted) {
  blockffn_step step = *first;
  if (count < 1 || step.num_logits != 1 || step.parents || step.num_earlier || step.num_exact || step.choices)
    return BLOCKFFN_BAD_ARGUMENT;
  if (step.length + step.num_tokens + count - 1 > model->capacity) return BLOCKFFN_BAD_ARGUMENT;
  float total = 0;
  int64_t token = 0;
  step.num_best = 1;
  *num_drafted = 0;
  for (int64_t i = 0; i < count; ++i) {
    step.best = outputs + i;
    step.best_log_probs = log_probs + i;
    const int32_t status = blockffn_decode_step(model, &step);
    if (status != BLOCKFFN_OK) return status;
    if (!(log_probs[i] > -__builtin_inff())) break;
    *num_drafted = i + 1;
    total += log_probs[i];
    if (total < least) break;
    token = token_ids ? token_ids[outputs[i]] : outputs[i];
    float* const last = step.hidden + (step.num_tokens - 1) * model->hidden_size;
    step.length += step.num_tokens;
    step.num_tokens = 1;
    step.tokens = &token;
    step.states = step.hidden = last;  // read before it is written
  }
  return BLOCKFFN_OK;
}

extern "C" int64_t blockffn_cache_bytes(const blockffn_model* model) {
  return Cache(*model).layer_bytes() * model->num_layers;
}

extern "C" int64_t blockffn_step_workspace(const blockffn_model* model) {
  constexpr int64_t kMost = BLOCKFFN_MAX_STEP;
  const int64_t most = model->capacity < kMost ? model->capacity : kMost;
  blockffn_step step{};
  step.num_tokens = step.num_logits = most;
  step.num_best = BLOCKFFN_MAX_BEST;
  step.num_exact = model->screen.data ? BLOCKFFN_MAX_BEST : 0;
  step.length = model->capacity - most;
  Positions positions;
  positions.set(step);
  return DecodeStep(*model, step, positions).reserve();
}

extern "C" void blockffn_move_positions(const blockffn_model* model, const int64_t* source, int64_t count,
                                        int64_t destination) {
  const Cache cache(*model);
  for (int64_t i = 0; i < count; ++i) {
    if (source[i] == destination + i) continue;
    for (int64_t layer = 0; layer < model->num_layers; ++layer)
      for (int64_t head = 0; head < model->num_key_heads; ++head) cache.move(layer, head, source[i], destination + i);
  }
}
