"""What users run instead, for scripts/bench_heads.sh; not to be run by hand.

    heads.py ablate|ablate_last|ablate_kept|michel|michel_frozen|retrieval CONFIG-FOLDER THREADS

As theirs.py: a JSON line when ready, then as many units of work as each line of stdin asks for.
"""

import json
import os
import sys

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
ROWS, TOKENS = 8, 64


def next_order(answer: dict) -> int:
    print(json.dumps(answer), flush=True)
    line = sys.stdin.readline()
    if not line.strip():
        os._exit(0)
    return int(line)


def new_model(kind, folder: str, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    return kind.from_config(config, attn_implementation="sdpa").eval()


def batch(config):
    ids = torch.arange(ROWS * TOKENS)
    ids = (ids * 7919 + ids * ids * 31) % config.vocab_size
    return ids.view(ROWS, TOKENS)


def hooked(model, found):
    """Leaves every head out in turn: a hook in front of each output projection zeroes its slice."""
    config = model.config
    d = config.n_embd // config.n_head
    off = [None]

    def hook(layer):
        def zero(_, args):
            (x,) = args
            if off[0] is not None and off[0][0] == layer:
                x = x.clone()
                x[..., off[0][1] * d : (off[0][1] + 1) * d] = 0
            return (x,)

        return zero

    blocks = model.transformer.h
    for layer, block in enumerate(blocks):
        block.attn.c_proj.register_forward_pre_hook(hook(layer))
    answer = {"choices": config.n_layer * config.n_head}
    while True:
        for _ in range(next_order(answer)):
            with torch.no_grad():
                for layer in range(config.n_layer):
                    for head in range(config.n_head):
                        off[0] = (layer, head)
                        found()
        answer = {}


def ablate(folder: str):
    model = new_model(transformers.AutoModelForCausalLM, folder)
    ids = batch(model.config)
    hooked(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.item())


def ablate_last(folder: str):
    """The loss at the last position of each row; the logits of all, as a model gives them."""
    model = new_model(transformers.AutoModelForCausalLM, folder)
    ids = batch(model.config)

    def loss():
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        return torch.nn.functional.cross_entropy(logits, ids[:, 0]).item()

    hooked(model, loss)


def classifier(folder: str):
    model = new_model(transformers.AutoModelForSequenceClassification, folder, num_labels=2)
    model.config.pad_token_id = 0
    ids = batch(model.config).clone()
    ids[ids == 0] = 1
    return model, ids, torch.arange(ROWS) % 2


def ablate_kept(folder: str):
    """The loss of a classifier."""
    model, ids, labels = classifier(folder)
    hooked(model, lambda: model(input_ids=ids, labels=labels, use_cache=False).loss.item())


def michel(folder: str, frozen: bool = False):
    """|gradient at a gate of each head| of every row: gates by row in hooks, so that rows can share a pass."""
    model, ids, labels = classifier(folder)
    if frozen:
        model.requires_grad_(False)
    config = model.config
    d = config.n_embd // config.n_head
    gates = [torch.ones(ROWS, 1, config.n_head, 1, requires_grad=True) for _ in range(config.n_layer)]

    def hook(layer):
        def gate(_, args):
            (x,) = args
            return ((x.view(*x.shape[:2], config.n_head, d) * gates[layer]).view_as(x),)

        return gate

    for layer, block in enumerate(model.transformer.h):
        block.attn.c_proj.register_forward_pre_hook(hook(layer))
    answer = {}
    while True:
        for _ in range(next_order(answer)):
            logits = model(input_ids=ids, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            torch.stack([gate.grad.flatten(1).abs().mean(0) for gate in gates])
            model.zero_grad()
            for gate in gates:
                gate.grad = None
        answer = {}


def retrieval(folder: str):
    """Attention returned while 16 tokens are written behind 4,096; what each head looked at most, and at the needle."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(4096)
    ids = ((ids * 7919 + ids * ids * 31) % config.vocab_size).view(1, -1)
    options = {"do_sample": False, "output_attentions": True, "return_dict_in_generate": True, "pad_token_id": 1}
    answer = {}
    while True:
        for _ in range(next_order(answer)):
            with torch.no_grad():
                found = model.generate(ids, max_new_tokens=16, min_new_tokens=16, **options)
                for step in found.attentions:
                    rows = torch.stack([layer[0, :, -1] for layer in step])
                    rows.argmax(-1), rows[..., 2000:2020].sum(-1)
        answer = {}


section, folder, threads = sys.argv[1:4]
torch.set_num_threads(int(threads))
{
    "ablate": ablate,
    "ablate_last": ablate_last,
    "ablate_kept": ablate_kept,
    "michel": michel,
    "retrieval": retrieval,
    "michel_frozen": lambda folder: michel(folder, frozen=True),
}[section](folder)
