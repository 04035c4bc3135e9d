// A card that does not exist: memory of its own, queues, random numbers and a backward thread, all on the host.
//
// It is there to be hard on whoever uses it. What is queued on a stream is done as late as torch's rules allow (or as
// early, or side streams before all else, or at random moments), and memory is handed out full of NaNs. So a copy that nobody waits for, or memory that
// goes to somebody else too soon, is wrong numbers every time, and not once in a thousand steps.
//
// An op computes on the host at once, after all that is queued before it on its own stream, and its result arrives in
// the card's memory as a queued write. Whoever reads that memory on another stream without waiting reads NaNs.
//
// No task takes Python's lock or torch's dispatcher: `lock` is taken by threads that hold the former.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace {

constexpr auto kind = c10::DeviceType::PrivateUse1;
constexpr int device_count = 2;
constexpr size_t block_bytes = 512;
constexpr int poison = 0xFF;  // NaN in every floating dtype, -1 in every integer

// Whatever lives as long as the process is never taken down: torch frees memory until the very end.
std::mutex& lock = *new std::mutex;  // over everything below; held for short, never while Python is called

// ---------------------------------------------------------------------------------------------------- queues

struct Queue;

struct Moment {  // of a queue: `place` of its tasks are done
  Queue* queue = nullptr;
  uint64_t place = 0;
};

struct Task {
  std::function<void()> work;
  Moment after;       // nothing else than to wait for it
  c10::Storage host;  // stays until the task is done
};

struct Queue {
  c10::DeviceIndex device;
  c10::StreamId id;
  std::deque<Task> tasks;
  uint64_t given = 0, done = 0;
};

enum class Order { late, early, rush, any };  // rush: only what is queued on a stream of its own is early
Order order = Order::late;
uint64_t dice = 1;
int64_t streams_made = 0;

auto& queues = *new std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Queue>;
auto& dropped = *new std::vector<c10::Storage>;  // to be let go of without the lock: that may need Python's

thread_local c10::DeviceIndex this_device = 0;
thread_local c10::StreamId this_stream[device_count] = {};

Queue& queue_of(c10::DeviceIndex device, c10::StreamId id) {
  auto found = queues.try_emplace({device, id}).first;
  found->second.device = device;
  found->second.id = id;
  return found->second;
}

Queue& current_queue(c10::DeviceIndex device) { return queue_of(device, this_stream[device]); }

Queue& queue_of(const c10::Stream& stream) { return queue_of(stream.device_index(), stream.id()); }

bool is_over(const Moment& moment) { return moment.queue == nullptr || moment.queue->done >= moment.place; }

void come_to(const Moment& moment);

void do_one(Queue& queue) {
  Task task = std::move(queue.tasks.front());
  queue.tasks.pop_front();
  come_to(task.after);
  if (task.work) task.work();
  queue.done += 1;
  if (task.host) dropped.push_back(std::move(task.host));
}

void come_to(const Moment& moment) {
  while (!is_over(moment)) do_one(*moment.queue);
}

Moment end_of(Queue& queue) { return {&queue, queue.given}; }

uint64_t roll() {
  dice ^= dice << 13;
  dice ^= dice >> 7;
  dice ^= dice << 17;
  return dice;
}

void give(Queue& queue, Task task) {
  queue.tasks.push_back(std::move(task));
  queue.given += 1;
  if (order == Order::early || (order == Order::rush && queue.id != 0)) come_to(end_of(queue));
  if (order == Order::any) {
    for (auto left = roll() % 4; left > 0; --left) {
      auto each = queues.begin();
      std::advance(each, roll() % queues.size());
      if (!each->second.tasks.empty()) do_one(each->second);
    }
  }
}

// Everything that torch calls comes in here: what was dropped is let go of once the lock is open again.
class Entered {
 public:
  Entered() : held_(lock) {}
  ~Entered() {
    std::vector<c10::Storage> gone;
    gone.swap(dropped);
    held_.unlock();
  }

 private:
  std::unique_lock<std::mutex> held_;
};

// ---------------------------------------------------------------------------------------------------- memory

struct Block {
  size_t size;
  Queue* owner;             // memory goes back to the queue that it was taken on
  std::set<Queue*> others;  // that were recorded on it
};

struct Leaving {
  void* address;
  Block block;
  std::vector<Moment> until;
};

struct Count {
  int64_t current = 0, peak = 0;
  void add(int64_t change) {
    current += change;
    peak = std::max(peak, current);
  }
};

auto& live = *new std::map<void*, Block>;
auto& unused = *new std::map<std::pair<Queue*, size_t>, std::vector<void*>>;
auto& leaving = *new std::vector<Leaving>;
Count allocated[device_count], reserved[device_count];
int64_t limit_bytes = -1;

void let_leave() {
  for (size_t i = 0; i < leaving.size();) {
    if (std::all_of(leaving[i].until.begin(), leaving[i].until.end(), is_over)) {
      unused[{leaving[i].block.owner, leaving[i].block.size}].push_back(leaving[i].address);
      leaving.erase(leaving.begin() + i);
    } else {
      ++i;
    }
  }
}

void finish_all() {
  for (auto& [_, queue] : queues) come_to(end_of(queue));
}

void drop_unused() {  // as a driver that frees waits for all that runs
  finish_all();
  let_leave();
  for (auto& [key, addresses] : unused) {
    for (void* address : addresses) {
      std::free(address);
      reserved[key.first->device].add(-static_cast<int64_t>(key.second));
    }
  }
  unused.clear();
}

void give_back(void* address) {
  if (address == nullptr) return;
  Entered entered;
  auto found = live.find(address);
  Block block = std::move(found->second);
  live.erase(found);
  allocated[block.owner->device].add(-static_cast<int64_t>(block.size));
  Leaving gone{address, std::move(block), {}};
  for (Queue* other : gone.block.others) gone.until.push_back(end_of(*other));
  leaving.push_back(std::move(gone));
}

struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t asked) override {
    auto device = this_device;
    c10::Device place(kind, device);
    if (asked == 0) return {nullptr, nullptr, &give_back, place};
    size_t size = (asked + block_bytes - 1) / block_bytes * block_bytes;
    Entered entered;
    let_leave();
    Queue& owner = current_queue(device);
    auto& ready = unused[{&owner, size}];
    void* address = nullptr;
    if (!ready.empty()) {
      address = ready.back();
      ready.pop_back();
    } else {
      auto wanted = reserved[device].current + static_cast<int64_t>(size);
      if (limit_bytes >= 0 && wanted > limit_bytes) {
        drop_unused();
        wanted = reserved[device].current + static_cast<int64_t>(size);
        TORCH_CHECK_WITH(
            OutOfMemoryError, wanted <= limit_bytes, "pretend:", static_cast<int>(device), " is out of memory: ", size,
            " bytes more than ", reserved[device].current, " of ", limit_bytes);
      }
      // a card's blocks begin at multiples of their unit, and kernels of the host add up in an order that depends on it
      TORCH_CHECK(posix_memalign(&address, block_bytes, size) == 0);
      reserved[device].add(static_cast<int64_t>(size));
    }
    allocated[device].add(static_cast<int64_t>(size));
    live[address] = Block{size, &owner, {}};
    give(owner, {[address, size] { std::memset(address, poison, size); }, {}, {}});
    return {address, address, &give_back, place};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    Entered entered;
    finish_all();
    std::memcpy(to, from, count);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    Entered entered;
    drop_unused();
  }
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    Entered entered;
    auto found = live.find(data.get_context());
    Queue& other = queue_of(stream);
    if (found != live.end() && found->second.owner != &other) found->second.others.insert(&other);
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    Entered entered;
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = allocated[device].current;
    stats.allocated_bytes[0].peak = allocated[device].peak;
    stats.reserved_bytes[0].current = reserved[device].current;
    stats.reserved_bytes[0].peak = reserved[device].peak;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override {
    Entered entered;
    allocated[device].peak = allocated[device].current;
    reserved[device].peak = reserved[device].current;
  }
};
Memory& memory = *new Memory;

// ---------------------------------------------------------------------------------------------------- pinned memory

auto& pinned = *new std::map<const void*, size_t>;
int64_t pinned_bytes = 0, pinned_requests = 0, pin_limit_bytes = -1;
bool error_waits = false;  // of a call that failed; whatever is launched next reports it

size_t power_of_two(size_t size) {
  size_t found = 1;
  while (found < size) found *= 2;
  return found;
}

void unpin(void* address) {
  if (address == nullptr) return;
  Entered entered;
  auto found = pinned.find(address);
  pinned_bytes -= static_cast<int64_t>(found->second);
  pinned.erase(found);
  std::free(address);
}

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t asked) override {
    if (asked == 0) return {nullptr, nullptr, &unpin, c10::Device(c10::kCPU)};
    Entered entered;
    auto size = power_of_two(asked);  // as torch does for CUDA
    if (pin_limit_bytes >= 0 && pinned_bytes + static_cast<int64_t>(size) > pin_limit_bytes) {
      error_waits = true;
      TORCH_CHECK(false, "pretend error: no more pages can be locked");
    }
    void* address = nullptr;
    TORCH_CHECK(posix_memalign(&address, 4096, size) == 0);
    std::memset(address, poison, size);
    pinned[address] = size;
    pinned_bytes += static_cast<int64_t>(size);
    pinned_requests += 1;
    return {address, address, &unpin, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};
Pinned& pinned_memory = *new Pinned;

bool is_pinned(const void* address) {
  auto above = pinned.upper_bound(address);
  if (above == pinned.begin()) return false;
  auto found = std::prev(above);
  return static_cast<const char*>(address) < static_cast<const char*>(found->first) + found->second;
}

// ---------------------------------------------------------------------------------------------------- streams, events

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kind; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before(kind, this_device);
    uncheckedSetDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kind, this_device}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) this_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return stream(device, this_stream[index(device)]); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool = false) const override {
    Entered entered;
    streams_made += 1;
    return stream(device, streams_made);
  }
  c10::Stream getNewStream(c10::Device device, int = 0) const override { return getStreamFromGlobalPool(device); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    auto& now = this_stream[next.device_index()];
    c10::Stream before = stream(next.device(), now);
    now = next.id();
    return before;
  }
  void record(void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    Entered entered;
    if (*event == nullptr) *event = new Moment;
    *static_cast<Moment*>(*event) = end_of(queue_of(on));
  }
  void block(void* event, const c10::Stream& on) const override {
    if (event == nullptr) return;
    Entered entered;
    give(queue_of(on), {nullptr, *static_cast<Moment*>(event), {}});
  }
  bool queryEvent(void* event) const override {
    Entered entered;
    return event == nullptr || is_over(*static_cast<Moment*>(event));
  }
  void synchronizeEvent(void* event) const override {
    Entered entered;
    if (event != nullptr) come_to(*static_cast<Moment*>(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Moment*>(event); }
  bool queryStream(const c10::Stream& asked) const override {
    Entered entered;
    return is_over(end_of(queue_of(asked)));
  }
  void synchronizeStream(const c10::Stream& asked) const override {
    Entered entered;
    come_to(end_of(queue_of(asked)));
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    Entered entered;
    finish_all();
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& on) const override {
    memory.recordStream(data, on);
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0.001; }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count; }

 private:
  static c10::DeviceIndex index(c10::Device device) { return device.has_index() ? device.index() : this_device; }
  static c10::Stream stream(c10::Device device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kind, index(device)), id);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---------------------------------------------------------------------------------------------------- random numbers

struct Random final : c10::GeneratorImpl {  // a seed and a count of what was drawn, as on CUDA
  explicit Random(c10::DeviceIndex device)
      : c10::GeneratorImpl(c10::Device(kind, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  void set_current_seed(uint64_t seed) override { state_[0] = seed, state_[1] = 0; }
  void set_offset(uint64_t offset) override { state_[1] = offset; }
  uint64_t get_offset() const override { return state_[1]; }
  uint64_t current_seed() const override { return state_[0]; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return state_[0];
  }
  void set_state(const c10::TensorImpl& given) override {
    TORCH_CHECK(given.numel() == sizeof(state_), "a state has ", sizeof(state_), " bytes, not ", given.numel());
    std::memcpy(state_, given.data(), sizeof(state_));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto found = at::detail::empty_cpu({sizeof(state_)}, at::kByte);
    std::memcpy(found.mutable_data_ptr(), state_, sizeof(state_));
    return found.getIntrusivePtr();
  }
  uint64_t next() {
    uint64_t drawn = state_[0] * 0x9E3779B97F4A7C15u + state_[1] + 1;
    state_[1] += 4;
    drawn ^= drawn >> 31;
    return drawn * 0xBF58476D1CE4E5B9u;
  }

 private:
  Random* clone_impl() const override {
    auto* copy = new Random(device().index());
    std::memcpy(copy->state_, state_, sizeof(state_));
    return copy;
  }
  uint64_t state_[2] = {c10::default_rng_seed_val, 0};
};

const at::Generator& own_generator(c10::DeviceIndex device) {
  static at::Generator all[device_count] = {at::make_generator<Random>(0), at::make_generator<Random>(1)};
  return all[device < 0 ? this_device : device];
}

// ---------------------------------------------------------------------------------------------------- copies

c10::DeviceIndex index_of(std::optional<c10::Device> device) {
  return device.has_value() && device->has_index() ? device->index() : this_device;
}

// The card's memory as the host sees it now.
at::Tensor seen(const at::Tensor& there) {
  return at::from_blob(there.data_ptr(), there.sizes(), there.strides(), there.options().device(at::kCPU));
}

void report_error() {
  Entered entered;
  if (!error_waits) return;
  error_waits = false;
  TORCH_CHECK(false, "pretend error: reported late, of a call before: no more pages can be locked");
}

void wait_for_this_stream(c10::DeviceIndex device) {
  Entered entered;
  come_to(end_of(current_queue(device)));
}

// Bytes in order into a tensor that need not be contiguous. No dispatcher: a task calls it.
void scatter(char* to, const char* from, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
             size_t item) {
  int64_t count = 1;
  for (auto size : sizes) count *= size;
  std::vector<int64_t> at(sizes.size());
  int64_t offset = 0;
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to + offset * static_cast<int64_t>(item), from + i * static_cast<int64_t>(item), item);
    for (auto dim = static_cast<int64_t>(sizes.size()) - 1; dim >= 0; --dim) {
      offset += strides[dim];
      if (++at[dim] < sizes[dim]) break;
      offset -= strides[dim] * sizes[dim];
      at[dim] = 0;
    }
  }
}

// Queued if the host's side of it is pinned.
bool queue_copy(c10::DeviceIndex device, const at::Tensor& to, const at::Tensor& from, c10::Storage host) {
  char* target = static_cast<char*>(to.data_ptr());
  const char* source = static_cast<const char*>(from.data_ptr());
  size_t bytes = from.nbytes();
  const void* pinned_side = host.data();
  Entered entered;
  if (!is_pinned(pinned_side)) return false;
  give(current_queue(device), {[=] { std::memcpy(target, source, bytes); }, {}, std::move(host)});
  return true;
}

// What holds a tensor or a storage is copied outside the lock, for the same reason as it is dropped there: a count of
// references may be Python's.
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  report_error();
  if (to.numel() == 0) return to;
  bool same = from.dtype() == to.dtype() && from.sizes() == to.sizes() && from.is_contiguous() && to.is_contiguous() &&
              from.is_conj() == to.is_conj() && from.is_neg() == to.is_neg();
  if (!to.is_privateuseone()) {
    auto device = from.device().index();
    if (non_blocking && same && queue_copy(device, to, from, to.storage())) return to;
    wait_for_this_stream(device);
    to.copy_(seen(from));
    return to;
  }
  auto device = to.device().index();
  char* target = static_cast<char*>(to.data_ptr());
  if (!from.is_privateuseone() && non_blocking && same && queue_copy(device, to, from, from.storage())) return to;
  at::Tensor now = from;
  if (from.is_privateuseone()) {
    wait_for_this_stream(from.device().index());
    now = seen(from);
  }
  auto content = at::empty(to.sizes(), to.options().device(at::kCPU).memory_format(at::MemoryFormat::Contiguous));
  content.copy_(now.expand(to.sizes()));
  const char* source = static_cast<const char*>(content.data_ptr());
  std::vector<int64_t> sizes(to.sizes().vec()), strides(to.strides().vec());
  size_t item = to.element_size();
  c10::Storage host = content.storage();
  {
    Entered entered;
    give(current_queue(device), {[=] { scatter(target, source, sizes, strides, item); }, {}, std::move(host)});
  }
  return to;
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(c10::Device(kind, index_of(device)));
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(c10::Device(kind, index_of(device)));
  return at::detail::empty_generic(
      size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

void resize_storage(const c10::Storage& storage, size_t bytes) {
  c10::DeviceGuard guard(storage.device());
  auto fresh = memory.allocate(bytes);
  auto kept = std::min(bytes, storage.nbytes());
  if (kept > 0) {
    Entered entered;
    auto* to = fresh.get();
    const auto* from = storage.data();
    give(current_queue(storage.device().index()), {[=] { std::memcpy(to, from, kept); }, {}, {}});
  }
  storage.set_data_ptr(std::move(fresh));  // what was there goes back to the allocator
  storage.set_nbytes(bytes);
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t bytes = (self.numel() + self.storage_offset()) * self.element_size();
  if (self.storage().nbytes() < bytes) resize_storage(self.storage(), bytes);
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  wait_for_this_stream(self.device().index());
  return at::_local_scalar_dense(seen(self));
}

at::Tensor& set_storage_offset(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                               c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  if (stride.empty() && !size.empty()) {
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage) {
  auto items = static_cast<int64_t>(storage.nbytes() / self.element_size());
  return set_storage_offset(self, std::move(storage), 0, {items}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage_offset(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// `tensor.data = other` may take a tensor to another device, as between CUDA and the host.
bool takes_data_of(const at::Tensor&, const at::Tensor&) { return true; }

void record_stream(at::Tensor& self, c10::Stream stream) { memory.recordStream(self.storage().data_ptr(), stream); }

// ---------------------------------------------------------------------------------------------------- ops

std::mutex drawing;
int64_t launches = 0;

// The host computes. Where numbers are drawn, its generator plays the part of the card's for the time of the op.
void on_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  report_error();
  launches += 1;
  if (!op.hasTag(at::Tag::nondeterministic_seeded)) return at::native::cpu_fallback(op, stack);
  auto count = op.schema().arguments().size();
  at::Generator drawn_from;
  c10::DeviceIndex device = this_device;
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    auto& given = (*stack)[i];
    if (given.isTensor() && given.toTensor().defined() && given.toTensor().is_privateuseone()) {
      device = given.toTensor().device().index();
    }
    if (given.isGenerator() && given.toGenerator().device().type() == kind) {
      drawn_from = given.toGenerator();
      given = c10::IValue();
    }
  }
  if (!drawn_from.defined()) drawn_from = own_generator(device);
  std::lock_guard<std::mutex> held(drawing);
  at::Generator host = at::detail::getDefaultCPUGenerator();
  auto before = host.get_state();
  host.set_current_seed(drawn_from.get<Random>()->next());
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    host.set_state(before);
    throw;
  }
  host.set_state(before);
}

int64_t attention_in_pieces(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            double, bool, std::optional<double>, bool) {
  return static_cast<int64_t>(at::SDPBackend::math);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return device_count; }
  void setCurrentDevice(c10::DeviceIndex device) const override { this_device = device; }
  c10::DeviceIndex getCurrentDevice() const override { return this_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    auto before = this_device;
    if (device >= 0) this_device = device;
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* address) const override {
    Entered entered;
    return is_pinned(address);
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override { return own_generator(device); }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<Random>(device < 0 ? this_device : device);
  }
  at::Device getDeviceFromPtr(void*) const override { return {kind, this_device}; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};
Hooks& hooks = *new Hooks;

// Pointers to memory go to torch when the library is loaded.
struct Registered {
  Registered() {
    c10::SetAllocator(kind, &memory);
    at::RegisterPrivateUse1HooksInterface(&hooks);
  }
} registered;

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_in_pieces)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("resize_", &resize_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("set_.source_Storage_storage_offset", &set_storage_offset);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("record_stream", &record_stream);
  m.impl("_has_compatible_shallow_copy_type", &takes_data_of);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(pow, Tensor_Scalar, fp32)
  KERNEL_PRIVATEUSEONE(rsqrt, fp32)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
}

// What a test says and asks.
TORCH_LIBRARY(pretend, m) {
  m.def("order(str which, int seed) -> ()", [](std::string which, int64_t seed) {
    Entered entered;
    order = which == "late" ? Order::late : which == "early" ? Order::early : which == "rush" ? Order::rush : Order::any;
    dice = static_cast<uint64_t>(seed) * 2 + 1;
  });
  m.def("limits(int memory_bytes, int pinned_bytes) -> ()", [](int64_t memory_bytes, int64_t pinned) {
    Entered entered;
    limit_bytes = memory_bytes;
    pin_limit_bytes = pinned;
  });
  m.def("counts() -> int[]", [] {
    Entered entered;
    return std::vector<int64_t>{streams_made, pinned_requests, pinned_bytes, launches, reserved[0].current};
  });
  m.def("generator(int device) -> Generator?", [](int64_t device) { return own_generator(static_cast<int8_t>(device)); });
}
