#include "memory.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace simulated {
namespace {

std::atomic<int64_t> used{0}, peak{0}, limit{INT64_MAX};
std::atomic<int64_t> operations{0}, fault_at{0};
std::atomic<int> fault{0};
std::atomic<int> devices{1};
thread_local c10::DeviceIndex current = 0;

bool due(Fault kind) {
  return fault.load() == static_cast<int>(kind) && operations.load() >= fault_at.load();
}

// A fault that strikes once: true for the one who disarms it.
bool strikes(Fault kind) {
  int armed = static_cast<int>(kind);
  return due(kind) && fault.compare_exchange_strong(armed, 0);
}

struct Block {
  void* data;
  std::size_t size;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  std::free(block->data);
  give_back(block->size);
  delete block;
}

struct HostMemory final : c10::Allocator {
  // Zeroed, and its pages are the system's until they are touched.
  c10::DataPtr allocate(std::size_t size) override {
    constexpr std::size_t kLine = 64;
    take(size);
    void* block = size ? std::calloc(1, size + kLine) : nullptr;
    if (size && block == nullptr) {
      give_back(size);
      TORCH_CHECK_WITH(OutOfMemoryError, false, "the host has no ", size, " bytes left");
    }
    const auto address = reinterpret_cast<std::uintptr_t>(block);
    void* data = size ? reinterpret_cast<void*>((address + kLine - 1) / kLine * kLine) : nullptr;
    return {data, new Block{block, size}, &free_block,
            c10::Device(c10::DeviceType::PrivateUse1, current)};
  }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    std::memcpy(to, from, size);
  }
};

struct Adopted {
  c10::Storage host;
  std::size_t size;
};

void free_adopted(void* context) {
  auto* adopted = static_cast<Adopted*>(context);
  give_back(adopted->size);
  delete adopted;
}

}  // namespace

void begin_operation() {
  operations.fetch_add(1);
  while (due(Fault::hang)) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  TORCH_CHECK(!due(Fault::death), "the simulated device is lost (injected): nothing runs on it "
              "until the process ends");
}

bool takes_nan() { return strikes(Fault::nan); }

void take(std::size_t size) {
  const int64_t total = used.fetch_add(static_cast<int64_t>(size)) + static_cast<int64_t>(size);
  const bool injected = strikes(Fault::out_of_memory);
  if (injected || total > limit.load()) {
    used.fetch_sub(static_cast<int64_t>(size));
    TORCH_CHECK_WITH(OutOfMemoryError, false, "the simulated device is out of memory",
                     injected ? " (injected)" : "", ": ", size, " bytes asked for, ",
                     total - static_cast<int64_t>(size), " of ", limit.load(), " in use");
  }
  int64_t seen = peak.load();
  while (total > seen && !peak.compare_exchange_weak(seen, total)) {
  }
}

void give_back(std::size_t size) { used.fetch_sub(static_cast<int64_t>(size)); }

c10::Allocator* allocator() {
  static HostMemory memory;
  return &memory;
}

c10::Storage adopt(const c10::Storage& host, c10::Device device) {
  const std::size_t size = host.nbytes();
  take(size);
  void* data = const_cast<void*>(host.data());
  return c10::Storage(c10::Storage::use_byte_size_t(), size,
                      c10::DataPtr(data, new Adopted{host, size}, &free_adopted, device),
                      allocator(), /*resizable=*/true);
}

c10::DeviceIndex current_device() { return current; }
void set_current_device(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < device_count(), "the simulated device has ",
              static_cast<int>(device_count()), " of its kind: there is no index ",
              static_cast<int>(index));
  current = index;
}
c10::DeviceIndex device_count() { return static_cast<c10::DeviceIndex>(devices.load()); }

}  // namespace simulated

// Called through ctypes.
extern "C" {

int64_t simulated_memory(int what) {
  using namespace simulated;
  return what == 0 ? used.load() : what == 1 ? peak.load() : limit.load();
}

void simulated_configure(int64_t bytes, int count) {
  simulated::limit = bytes;
  simulated::devices = count;
}

void simulated_reset_peak() { simulated::peak = simulated::used.load(); }

int64_t simulated_operations() { return simulated::operations.load(); }

// The fault strikes once `after` more operations have run.
void simulated_inject(int kind, int64_t after) {
  simulated::fault_at = simulated::operations.load() + after + 1;
  simulated::fault = kind;
}

int simulated_current() { return simulated::current; }
int simulated_set_current(int index) {
  if (index < 0 || index >= simulated::device_count()) return 1;
  simulated::current = static_cast<c10::DeviceIndex>(index);
  return 0;
}

}  // extern "C"
