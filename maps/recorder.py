"""The recorder: the softmaxed attention weights of any model's forward pass, without an edit to the model."""

import inspect

import torch
import torch.nn.functional as F
from torch import nn

from errors import UserError


def in_float32(x):
    """A tensor in float32 where it is coarser."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class AttentionRecorder:
    """Records the attention weights of every layer during a forward pass of `model`, as a context manager.

    `attentions` is a list of (B, heads, N, N), first layer first, query before key, rows summing to 1; with
    gradients=True and after a backward pass, `gradients` is the list of their gradients. `pooling` is (B, N), how a
    model pools its tokens: by a softmax, by a last attention with one query (the mean over its heads), or uniformly
    where its attribute `class_token` is False; else None. Each forward pass replaces what the one before left.

    While it is open, torch's scaled_dot_product_attention is one that keeps its weights, nn.MultiheadAttention takes no
    other way (though it gives weights to who asks for them), and submodules named `softmax` are hooked. Leaving puts
    all of it back. Raises UserError where a forward pass meets no attention, one from some tokens to others, or a
    module with `sums_to_one` False.
    """

    def __init__(self, model, *, gradients=False):
        self.model, self.keep_gradients = model, gradients
        self.weights, self.pooling, self.asked, self.running = [], None, [], False

    def __enter__(self):
        self.fused = F.scaled_dot_product_attention
        self.fast_path = torch.backends.mha.get_fastpath_enabled()
        F.scaled_dot_product_attention = self.attend_and_keep
        torch.backends.mha.set_fastpath_enabled(False)
        softmaxes = [module for name, module in self.model.named_modules() if name.rpartition(".")[2] == "softmax"]
        multihead = [module for module in self.model.modules() if isinstance(module, nn.MultiheadAttention)]
        self.hooks = [
            self.model.register_forward_pre_hook(self.begin_forward),
            self.model.register_forward_hook(self.end_forward),
            *(module.register_forward_hook(self.keep_softmax) for module in softmaxes),
            *(module.register_forward_pre_hook(self.ask_no_weights, with_kwargs=True) for module in multihead),
            *(module.register_forward_hook(self.give_weights) for module in multihead),
        ]
        return self

    def __exit__(self, *exception):
        F.scaled_dot_product_attention = self.fused
        torch.backends.mha.set_fastpath_enabled(self.fast_path)
        for hook in self.hooks:
            hook.remove()

    def begin_forward(self, model, inputs):
        self.weights, self.pooling, self.asked, self.running = [], None, [], True

    def end_forward(self, model, inputs, output):
        self.running = False
        for module in model.modules():
            if getattr(module, "sums_to_one", None) is False:
                name = type(module).__name__
                raise UserError(f"{name}'s weights are no distribution to draw: attribute.py explains any model")
        if self.weights and self.pooling is None and self.weights[-1].shape[-2] == 1 < self.weights[-1].shape[-1]:
            self.pooling = in_float32(self.weights.pop().detach()).mean(1)[:, 0]
        if not self.weights:
            raise UserError(f"{type(model).__name__} has no attention to record: attribute.py explains any model")
        for weights in self.weights:
            if weights.shape[-2] != weights.shape[-1]:
                tokens = f"{weights.shape[-2]} tokens to {weights.shape[-1]} others"
                raise UserError(f"{type(model).__name__} attends from {tokens}: attribute.py explains any model")
        if self.pooling is None and getattr(model, "class_token", None) is False:
            weights = self.attentions[-1]
            self.pooling = weights.new_full((len(weights), weights.shape[-1]), 1 / weights.shape[-1])

    def keep(self, weights):
        if self.keep_gradients:
            if not weights.requires_grad:
                weights.requires_grad_()
            weights.retain_grad()
        self.weights.append(weights)

    def keep_softmax(self, module, inputs, output):
        if output.ndim == 4:  # (B, heads, N, N): attention that comes about in a way of its own
            self.keep(output)
        elif output.ndim == 3 and 1 in output.shape[1:]:  # (B, N, 1) or (B, 1, N): sequence pooling
            self.pooling = in_float32(output.detach().flatten(1))

    def ask_no_weights(self, module, inputs, options):
        """Where it is to give its weights, nn.MultiheadAttention calls nothing that could be replaced."""
        if not self.running:
            self.asked.append((False, False))
            return None
        call = inspect.signature(module.forward).bind(*inputs, **options)
        call.apply_defaults()
        self.asked.append((call.arguments["need_weights"], call.arguments["average_attn_weights"]))
        call.arguments["need_weights"] = False
        return call.args, call.kwargs

    def give_weights(self, module, inputs, output):
        wanted, averaged = self.asked.pop()
        if not wanted:
            return None
        weights = self.weights[-1].mean(1) if averaged else self.weights[-1]
        return output[0], weights if output[0].ndim == 3 else weights[0]

    def attend_and_keep(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        """torch's scaled_dot_product_attention, written out, in float32 where the inputs are coarser."""
        if not self.running:
            return self.fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        if options.get("enable_gqa"):
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights = weights.reshape(len(weights), -1, *weights.shape[-2:])  # (B, heads, N, N), of (B, N, N) one head
        self.keep(weights)
        return F.dropout(weights, dropout_p).view_as(scores).to(value.dtype) @ value

    @property
    def attentions(self):
        return [in_float32(weights.detach()) for weights in self.weights]

    @property
    def gradients(self):
        """Raises RuntimeError where there are none: without gradients=True, or before a backward pass."""
        if not self.keep_gradients or any(weights.grad is None for weights in self.weights):
            raise RuntimeError("no gradients yet: AttentionRecorder(model, gradients=True), then a backward pass")
        return [weights.grad for weights in self.weights]
