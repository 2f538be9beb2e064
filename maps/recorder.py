"""The attention weights of any model's forward pass, recorded without an edit to the model."""

import inspect

import torch
import torch.nn.functional as F
from torch import nn

from errors import UserError


def at_least_float32(x):
    """A bfloat16 or float16 tensor in float32; other tensors as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class AttentionRecorder:
    """Context manager that records the attention weights of every layer while `model` runs.

    After a forward pass, `attentions` is a list of (B, heads, N, N), first layer first, query before key; rows sum to
    1. With gradients=True and after a backward pass, `gradients` is the list of their gradients. `pooling` (B, N) is
    how the model pools its tokens: by a softmax, by a last attention layer with one query (the mean over its heads),
    or uniformly if the model's attribute `class_token` is False; otherwise None. Each forward pass replaces the last.

    Inside the context, torch's scaled_dot_product_attention is replaced by a version that keeps its weights,
    nn.MultiheadAttention always calls it, and submodules named `softmax` are hooked. Leaving restores everything.
    A forward pass raises UserError if the model has no attention, if queries and keys differ in number, or if a module
    has `sums_to_one` False.
    """

    def __init__(self, model, *, gradients=False):
        self.model, self.keep_gradients = model, gradients
        self.weights, self.pooling, self.requests, self.running = [], None, [], False

    def __enter__(self):
        self.fused = F.scaled_dot_product_attention
        self.fast_path = torch.backends.mha.get_fastpath_enabled()
        F.scaled_dot_product_attention = self.attend_and_keep
        torch.backends.mha.set_fastpath_enabled(False)  # the fast path calls a fused kernel directly
        softmaxes = [module for name, module in self.model.named_modules() if name.rpartition(".")[2] == "softmax"]
        multihead = [module for module in self.model.modules() if isinstance(module, nn.MultiheadAttention)]
        self.hooks = [
            self.model.register_forward_pre_hook(self.begin_forward),
            self.model.register_forward_hook(self.end_forward),
            *(module.register_forward_hook(self.keep_softmax) for module in softmaxes),
            *(module.register_forward_pre_hook(self.request_no_weights, with_kwargs=True) for module in multihead),
            *(module.register_forward_hook(self.return_weights) for module in multihead),
        ]
        return self

    def __exit__(self, *exception):
        F.scaled_dot_product_attention = self.fused
        torch.backends.mha.set_fastpath_enabled(self.fast_path)
        for hook in self.hooks:
            hook.remove()

    def begin_forward(self, model, inputs):
        self.weights, self.pooling, self.requests, self.running = [], None, [], True

    def end_forward(self, model, inputs, output):
        self.running = False
        name = type(model).__name__
        for module in model.modules():
            if getattr(module, "sums_to_one", None) is False:
                name = type(module).__name__
                raise UserError(f"the weights of {name} are not a distribution and cannot be drawn: use attribute.py")
        # a last layer with one query, (B, heads, 1, N), pools the tokens and is not a layer of the rollout
        if self.weights and self.pooling is None and self.weights[-1].shape[-2] == 1 < self.weights[-1].shape[-1]:
            self.pooling = at_least_float32(self.weights.pop().detach()).mean(1)[:, 0]  # (B, N)
        if not self.weights:
            raise UserError(f"{name} has no attention to record: use attribute.py, which explains any model")
        for weights in self.weights:
            queries, keys = weights.shape[-2:]
            if queries != keys:
                raise UserError(f"{name} attends from {queries} tokens to {keys} others: use attribute.py instead")
        if self.pooling is None and getattr(model, "class_token", None) is False:
            weights = self.attentions[-1]
            self.pooling = weights.new_full((len(weights), weights.shape[-1]), 1 / weights.shape[-1])

    def keep(self, weights):
        if self.keep_gradients:
            if not weights.requires_grad:  # all parameters are frozen: the graph begins here
                weights.requires_grad_()
            weights.retain_grad()
        self.weights.append(weights)

    def keep_softmax(self, module, inputs, output):
        if output.ndim == 4:  # (B, heads, N, N): attention that does not call scaled_dot_product_attention
            self.keep(output)
        elif output.ndim == 3 and 1 in output.shape[1:]:  # (B, N, 1) or (B, 1, N): sequence pooling
            self.pooling = at_least_float32(output.detach().flatten(1))

    def request_no_weights(self, module, inputs, options):
        """Call nn.MultiheadAttention with need_weights=False: only then does it use scaled_dot_product_attention."""
        if not self.running:
            self.requests.append((False, False))  # return_weights takes one entry per call
            return None
        call = inspect.signature(module.forward).bind(*inputs, **options)
        call.apply_defaults()
        self.requests.append((call.arguments["need_weights"], call.arguments["average_attn_weights"]))
        call.arguments["need_weights"] = False
        return call.args, call.kwargs

    def return_weights(self, module, inputs, output):
        """Return the recorded weights to a caller of nn.MultiheadAttention that requested weights."""
        requested, averaged = self.requests.pop()
        if not requested:
            return None
        weights = self.weights[-1].mean(1) if averaged else self.weights[-1]
        return output[0], weights if output[0].ndim == 3 else weights[0]  # inputs may have no batch dimension

    def attend_and_keep(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        """torch's scaled_dot_product_attention written out, with the softmax in float32 or finer."""
        if not self.running:  # another model: only the forward pass of self.model is recorded
            return self.fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        if options.get("enable_gqa"):  # several query heads share a key head
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights = weights.reshape(len(weights), -1, *weights.shape[-2:])  # (B, heads, N, N); (B, N, N) is one head
        self.keep(weights)
        return F.dropout(weights, dropout_p).view_as(scores).to(value.dtype) @ value

    @property
    def attentions(self):
        return [at_least_float32(weights.detach()) for weights in self.weights]

    @property
    def gradients(self):
        """Raises RuntimeError without gradients=True or before a backward pass."""
        if not self.keep_gradients or any(weights.grad is None for weights in self.weights):
            raise RuntimeError("no gradients yet: use AttentionRecorder(model, gradients=True), then a backward pass")
        return [weights.grad for weights in self.weights]
