// A device behind torch's PrivateUse1 key. Its memory is the host's, and so are its kernels: one
// boxed fallback shows the host a tensor's own memory, runs the host's kernel and takes the results
// back, without a copy. What it keeps of a real device: tensors of its own type, memory that runs
// out, and an error where host and device tensors meet.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"

namespace simulated {
namespace {

using at::Tensor;
constexpr auto kDevice = c10::DeviceType::PrivateUse1;

bool is_ours(const Tensor& t) { return t.defined() && t.device().type() == kDevice; }

std::mutex host_operands_lock;
// Operators that take host tensors beside the device's: a vendor's kernels want some lengths there.
std::set<std::string>& host_operands() {
  static std::set<std::string> names{"aten::_copy_from", "aten::_copy_from_and_resize"};
  return names;
}

bool takes_host_operands(const c10::OperatorHandle& op) {
  std::lock_guard<std::mutex> guard(host_operands_lock);
  return host_operands().count(op.operator_name().name) > 0;
}

// The host's view of the tensors of one call, and the way back.
class Views {
 public:
  Tensor to_host(const Tensor& ours) {
    for (const auto& [known, host] : tensors_)
      if (known.is_same(ours)) return host;
    device_ = ours.device();
    auto impl = c10::make_intrusive<c10::TensorImpl>(
        c10::Storage(host_storage(ours.storage())), c10::DispatchKeySet(c10::DispatchKey::CPU),
        ours.dtype());
    impl->set_sizes_and_strides(ours.sizes(), ours.strides(), ours.storage_offset());
    if (ours.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    Tensor host(std::move(impl));
    tensors_.emplace_back(ours, host);
    return host;
  }

  Tensor to_device(const Tensor& host) {
    if (!host.defined() || is_ours(host)) return host;
    for (const auto& [ours, known] : tensors_)
      if (known.is_same(host)) return ours;
    auto impl = new_impl(host);
    impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    return Tensor(std::move(impl));
  }

  // Operators with `out=` and resize_ may have given a tensor new memory or a new shape.
  void take_over_changes() {
    for (const auto& [ours, host] : tensors_) {
      auto* impl = ours.unsafeGetTensorImpl();
      if (host.storage().data() != ours.storage().data())
        impl->set_storage_keep_dtype(device_storage(host.storage()));
      if (host.sizes() != ours.sizes() || host.strides() != ours.strides() ||
          host.storage_offset() != ours.storage_offset())
        impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

  void set_device(c10::Device device) { device_ = device; }

 private:
  c10::intrusive_ptr<c10::TensorImpl> new_impl(const Tensor& host) {
    for (const auto& [ours, known] : tensors_)
      if (known.storage().is_alias_of(host.storage()))  // a view, which autograd treats as its base
        return c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW,
                                                    c10::Storage(device_storage(host.storage())),
                                                    ours.key_set(), host.dtype());
    return c10::make_intrusive<c10::TensorImpl>(
        c10::Storage(device_storage(host.storage())),
        c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), host.dtype());
  }

  c10::Storage host_storage(const c10::Storage& ours) {
    for (const auto& [known, host] : storages_)
      if (known.is_alias_of(ours)) return host;
    auto release = [](void* kept) { delete static_cast<c10::Storage*>(kept); };
    c10::Storage host(c10::Storage::use_byte_size_t(), ours.nbytes(),
                      c10::DataPtr(const_cast<void*>(ours.data()), new c10::Storage(ours), release,
                                   c10::Device(c10::DeviceType::CPU)),
                      c10::GetAllocator(c10::DeviceType::CPU), /*resizable=*/true);
    storages_.emplace_back(ours, host);
    return host;
  }

  c10::Storage device_storage(const c10::Storage& host) {
    for (const auto& [ours, known] : storages_)
      if (known.is_alias_of(host) && known.data() == ours.data()) return ours;
    for (const auto& [ours, known] : adopted_)
      if (known.is_alias_of(host)) return ours;
    c10::Storage ours = adopt(host, device_);
    adopted_.emplace_back(ours, host);
    return ours;
  }

  c10::Device device_{kDevice, current_device()};
  std::vector<std::pair<Tensor, Tensor>> tensors_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_, adopted_;
};

// torch's rule: a host tensor may stand beside the device's only as a number.
void check_operand(const c10::OperatorHandle& op, const Tensor& t, c10::Device device) {
  if (!t.defined() || t.device() == device) return;
  if (t.device().is_cpu() && (t.dim() == 0 || takes_host_operands(op))) return;
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two "
              "devices, ", device, " and ", t.device(), "! (", op.operator_name(), ")");
}

c10::optional<c10::Device> device_of(const torch::jit::Stack& stack, std::size_t begin) {
  for (std::size_t i = begin; i < stack.size(); ++i) {
    const auto& value = stack[i];
    if (value.isTensor() && is_ours(value.toTensor())) return value.toTensor().device();
    if (value.isTensorList())
      for (const Tensor& t : value.toTensorVector())
        if (is_ours(t)) return t.device();
    if (value.isDevice() && value.toDevice().type() == kDevice) return value.toDevice();
  }
  return c10::nullopt;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  begin_operation();
  const std::size_t num_inputs = op.schema().arguments().size();
  const std::size_t begin = stack->size() - num_inputs;
  Views views;
  c10::Device device = device_of(*stack, begin).value_or(c10::Device(kDevice, current_device()));
  if (!device.has_index()) device = c10::Device(kDevice, current_device());
  views.set_device(device);
  auto to_host = [&](const Tensor& t) {
    check_operand(op, t, device);
    return is_ours(t) ? views.to_host(t) : t;
  };
  for (std::size_t i = begin; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      if (value.toTensor().defined()) value = to_host(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> hosts;
      for (const Tensor& t : value.toTensorVector()) hosts.push_back(to_host(t));
      value = std::move(hosts);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> hosts;
      for (std::optional<Tensor> t : value.toOptionalTensorList())
        hosts.push_back(t.has_value() && t->defined() ? std::optional<Tensor>(to_host(*t)) : t);
      value = std::move(hosts);
    } else if (value.isDevice() && value.toDevice().type() == kDevice) {
      value = c10::Device(c10::DeviceType::CPU);
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  views.take_over_changes();
  const std::size_t num_results = op.schema().returns().size();
  for (std::size_t i = stack->size() - num_results; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      Tensor t = value.toTensor();
      if (t.defined() && t.is_floating_point() && takes_nan()) t.fill_(NAN);
      value = views.to_device(t);
    } else if (value.isTensorList()) {
      c10::List<Tensor> ours;
      for (const Tensor& t : value.toTensorVector()) ours.push_back(views.to_device(t));
      value = std::move(ours);
    }
  }
}

// Zeroed memory, whose pages the system hands out as they are touched.
Tensor zeros(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  begin_operation();
  return at::detail::empty_generic(size, allocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), std::nullopt);
}

// What nobody wrote is NaN in every floating dtype: a device's memory is not zero either.
Tensor unwritten(const Tensor& t) {
  if (t.storage().nbytes()) std::memset(t.storage().mutable_data(), 0xff, t.storage().nbytes());
  return t;
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  begin_operation();
  return unwritten(at::detail::empty_generic(size, allocator(),
                                             c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                             c10::dtype_or_default(dtype), format));
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  begin_operation();
  return unwritten(at::detail::empty_strided_generic(
      size, stride, allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype)));
}

// Between host and device, either way.
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  begin_operation();
  Views views;
  Tensor target = is_ours(to) ? views.to_host(to) : to;
  target.copy_(is_ours(from) ? views.to_host(from) : from);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  begin_operation();
  Views views;
  Tensor target = is_ours(to) ? views.to_host(to) : to;
  target.resize_(from.sizes()).copy_(is_ours(from) ? views.to_host(from) : from);
  views.take_over_changes();
  return to;
}

// The tensor's own memory as a host tensor: the process group works on it.
Tensor host_view(const Tensor& ours) {
  begin_operation();
  return Views().to_host(ours);
}

TORCH_LIBRARY(vllm_di_simulated, m) {
  m.def("host_view(Tensor(a) ours) -> Tensor(a)");
}

TORCH_LIBRARY_IMPL(vllm_di_simulated, PrivateUse1, m) { m.impl("host_view", host_view); }

// A host tensor is its own view.
TORCH_LIBRARY_IMPL(vllm_di_simulated, CPU, m) {
  m.impl("host_view", [](const Tensor& host) { return host; });
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("zeros", zeros);
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("view", at::native::view);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  // torch would take these apart for an unknown device; the host has kernels for the whole
  for (const char* whole : {"linear", "matmul", "scaled_dot_product_attention"})
    m.impl(whole, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device d) const override {
    const c10::Device before = getDevice();
    setDevice(d);
    return before;
  }
  c10::Device getDevice() const override { return {kDevice, current_device()}; }
  void setDevice(c10::Device d) const override {
    if (d.has_index()) set_current_device(d.index());
  }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.has_index() && d.index() < device_count()) set_current_device(d.index());
  }
  c10::Stream getStream(c10::Device d) const override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream exchangeStream(c10::Stream s) const override { return getStream(s.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }
  void synchronizeDevice(const c10::DeviceIndex) const override { begin_operation(); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return device_count(); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device(); }
  void setCurrentDevice(c10::DeviceIndex index) const override { set_current_device(index); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetAllocator(c10::DeviceType::CPU);  // all of the host's memory is as near
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, std::size_t size) const override {
    c10::Storage kept = storage;
    auto data = allocator()->allocate(size);
    std::memcpy(data.get(), storage.data(), std::min(size, storage.nbytes()));
    kept.set_data_ptr_noswap(std::move(data));
    kept.set_nbytes(size);
  }
};

}  // namespace
}  // namespace simulated

// Called through ctypes.
extern "C" {

void simulated_register() {
  static simulated::Hooks hooks;
  if (!at::isPrivateUse1HooksRegistered()) at::RegisterPrivateUse1HooksInterface(&hooks);
}

void simulated_allow_host_operands(const char* op) {
  std::lock_guard<std::mutex> guard(simulated::host_operands_lock);
  simulated::host_operands().insert(op);
}

}  // extern "C"
