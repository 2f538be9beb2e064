"""--fsdp: weights, gradients and optimiser state divided among ranks (FSDP2), for models that do not fit on one GPU.

Checkpoints hold whole tensors, so any number of ranks resumes them, with or without --fsdp.
"""

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def shard_model(model, device, ranks):
    """Divide a model's weights among the ranks, block by block: only one block is whole at any time. Returns it."""
    mesh = init_device_mesh(device.type, (ranks,))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gathered(state):
    """A state dict with whole tensors in place of shards; every rank must call this."""
    return tree_map_only(DTensor, DTensor.full_tensor, state)


def sharded_like(tensor, parameter):
    """This rank's shard of a whole tensor, as a parameter is sharded; the tensor itself if its shape is another."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def sharded_weights(weights, model):
    """Whole weights as shards, for model.load_state_dict."""
    own = model.state_dict()
    return {name: sharded_like(tensor, own[name]) for name, tensor in weights.items()}


def sharded_state(state, optimizer):
    """An optimiser's whole state as shards, for its load_state_dict."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        number: {name: sharded_like(tensor, parameters[number]) for name, tensor in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": shards}
