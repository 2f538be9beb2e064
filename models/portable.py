"""A model as others run it: as ONNX, as torch.export's program, or as its weights alone; all as the bytes of a file."""

import copy
import io
import json

import torch

from errors import import_optional


def traced(model, images):
    """torch.export's program of a model in evaluation mode, for batches of any size; images (2, 3, H, W) or more.

    A batch of one would be taken for a constant.
    """
    return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def to_onnx(model, images, notes):
    """ONNX from `images` (batch, 3, H, W), normalised, to `logits` (batch, classes); notes {name: text}: metadata."""
    import_optional("onnxscript")
    program = torch.onnx.export(
        traced(model, images), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # the lines and paths of the code that it comes from
    program.model.metadata_props.update(notes)
    return program.model_proto.SerializeToString()


def run_onnx(model, data):
    """A function from images to logits, by onnxruntime on the CPU, on as many threads as torch has."""
    runtime = import_optional("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def to_torch(model, images, notes):
    """torch.export's program, with notes in its file metadata.json."""
    file = io.BytesIO()
    torch.export.save(traced(model, images), file, extra_files={"metadata.json": json.dumps(notes)})
    return file.getvalue()


def run_torch(model, data):
    return torch.export.load(io.BytesIO(data)).module()


def to_safetensors(model, images, notes):
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}
    return import_optional("safetensors.torch").save(weights, notes)


def run_safetensors(model, data):
    model = copy.deepcopy(model)
    model.load_state_dict(import_optional("safetensors.torch").load(data))
    return model


PORTABLE = {  # {format: (suffix of its files, from a model to bytes, from bytes to a function that runs them)}
    "onnx": ("onnx", to_onnx, run_onnx),
    "torch": ("pt2", to_torch, run_torch),
    "safetensors": ("safetensors", to_safetensors, run_safetensors),
}
