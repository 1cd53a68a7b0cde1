"""A simulated device behind torch's PrivateUse1 key, in C++ (``device.cpp``), for ports whose
hardware is not at hand."""
