// Memory of the simulated device: the host's, counted against a limit. And the faults that a test
// may ask for.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>

#include <cstdint>

namespace simulated {

enum class Fault : int { none = 0, out_of_memory = 1, hang = 2, nan = 3, death = 4 };

// Before each operation: counts it, and hangs or throws where a fault says so.
void begin_operation();

// Whether the operation that ran is the one whose result turns into NaN.
bool takes_nan();

// Raises torch's OutOfMemoryError when `size` more bytes would exceed the limit.
void take(std::size_t size);
void give_back(std::size_t size);

c10::Allocator* allocator();

// Host memory under the device's name, counted for as long as the storage lives.
c10::Storage adopt(const c10::Storage& host, c10::Device device);

c10::DeviceIndex current_device();
void set_current_device(c10::DeviceIndex index);
c10::DeviceIndex device_count();

}  // namespace simulated
