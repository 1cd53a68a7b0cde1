"""Huawei's Ascend NPUs, through torch-npu and the kernels that it registers with torch."""
