"""A traced step to an OpenVINO model, by OpenVINO's PyTorch frontend."""

from __future__ import annotations

from typing import Any

from vllm_di.components.program.traced import TracedStep
from vllm_di.errors import ConfigError
from vllm_di.ports.openvino.device import load_openvino
from vllm_di.ports.openvino.paged_attention import NAME, convert_mark


def convert(step: TracedStep) -> Any:
    """-> ``openvino.Model`` with the step's inputs, in order and by name, and weights that it keeps
    alive. Raises ConfigError for an op that the frontend does not know.

    The frontend is called directly: ``openvino.convert_model`` would report its use to a server.
    """
    ov = load_openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch import ConversionExtension
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    op_type = f"{NAME.replace('::', '.')}.default"
    frontend.add_extension(ConversionExtension(op_type, convert_mark))
    decoder = TorchFXPythonDecoder(step.graph, dynamic_shapes=True)
    try:
        model = frontend.convert(frontend.load(decoder))
    except Exception as error:  # of the frontend's own kinds, that have nothing in common
        lines = [line for line in str(error).splitlines() if line.startswith("-- ")]
        raise ConfigError(
            f"OpenVINO's frontend cannot convert the step: {'; '.join(lines) or error}",
            key="program",
        ) from error
    for name, parameter in zip(step.inputs, model.get_parameters(), strict=True):
        parameter.output(0).get_tensor().set_names({name})
        kind, _, layer = name.partition(".")
        if kind in ("key", "value") and int(layer) not in step.unwritten:
            # PagedAttention's cache: the plugin chooses type and shape when it compiles
            parameter.set_partial_shape(ov.PartialShape([-1, -1, -1, -1]))
            parameter.set_element_type(ov.Type.dynamic)
    _own_bfloat16(model)
    model.validate_nodes_and_infer_types()
    return model


def _own_bfloat16(model: Any) -> None:
    """Give constants in bf16 memory of their own. The frontend points them at the torch tensors and
    holds nothing that keeps those alive (numpy has no bf16; constants of other types hold theirs),
    and the compiled model goes on reading some of them, the embedding's among them."""
    from openvino.op import Constant

    for node in model.get_ops():
        if isinstance(node, Constant) and node.get_element_type().get_type_name() == "bf16":
            copy = Constant(node.tensor_view, shared_memory=False)
            copy.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(copy.output(0))
