"""Every tuner of Hugging Face peft through one entry, `peft:<type>`: peft builds the model, the suite trains it.

A tuner runs alone, on a base that it spoils. Its options are peft's own, under peft's names. Beside them stands one
whole number, `size`, from which the option that sets the tuner's parameters follows (`TUNERS` says which), so that a
budget means the same for a tuner as for every other method. Parameters are counted by letting peft build the tuner on a
base without memory (meta tensors); where peft must see the weights to build, the count stands in closed form.
"""

from __future__ import annotations

import dataclasses
import json
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, reduce
from math import ceil, gcd
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from suite.errors import one_of
from suite.method import Context, GradientRequest, Layer, Method, MethodConfig, Paper, Preparation, Shapes
from suite.specs import PositiveInt

Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What options may be derived from: the adapted layers, and the base they are part of."""

    layers: tuple[Layer, ...]
    model: Any

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    @property
    def narrowest(self) -> int:
        """The smallest side of a layer: the most that a rank can be everywhere."""
        return min(min(layer.in_features, layer.out_features) for layer in self.layers)

    @property
    def smallest(self) -> int:
        """Scalars of the smallest layer."""
        return min(layer.in_features * layer.out_features for layer in self.layers)

    @property
    def depth(self) -> int:
        return int(self.model.config.num_hidden_layers)

    def block(self, most: int, inputs: bool = True, outputs: bool = True) -> int:
        """The largest block, at most `most`, that divides every input and output width."""
        return max(size for size in self.blocks(inputs, outputs) if size <= most)

    def refuse_transposed(self) -> None:
        """Raise `ValueError` where a layer is GPT-2's `Conv1D`, which holds its weight transposed."""
        if not all(isinstance(self.model.get_submodule(name), torch.nn.Linear) for name in self.names):
            raise ValueError("it takes layers of torch.nn.Linear only")

    def blocks(self, inputs: bool = True, outputs: bool = True) -> list[int]:
        """Every block size that divides the widths of all layers."""
        widths = [layer.in_features for layer in self.layers] * inputs
        widths += [layer.out_features for layer in self.layers] * outputs
        common = reduce(gcd, widths)
        return [size for size in range(1, common + 1) if common % size == 0]


@dataclasses.dataclass(frozen=True)
class Tuner:
    """One tuner type.

    `options(facts)`: what is set where the user sets nothing and peft's default does not fit every base. `sized(size,
    facts)`: the options that a size sets (None: the tuner has no size). `sizes(facts)`: the sizes there are, where not
    every whole number is one. `count(options, facts)`: trained scalars in closed form, where peft cannot build without
    weights. `bases`: kinds of base it works on. `resumes`: a killed run goes on from a checkpoint. `refused`: why it
    cannot be run at all.
    """

    kind: str
    label: str
    title: str
    arxiv: str | None = None
    year: int | None = None
    options: Callable[[Facts], Options] = lambda facts: {}
    sized: Callable[[int, Facts], Options] | None = None
    sizes: Callable[[Facts], Iterable[int]] | None = None
    count: Callable[[Options, Facts], int | None] | None = None
    linear: bool = True  # target_modules is every linear layer unless the user says otherwise
    bases: tuple[str, ...] = ("encoder", "causal", "seq2seq")
    resumes: bool = True
    refused: str | None = None


def _is(option: str) -> Callable[[int, Facts], Options]:
    """The size is an option of the tuner."""
    return lambda size, facts: {option: size}


def _rank(most: int) -> Callable[[Facts], Options]:
    """Peft's rank, or the largest that fits every layer."""
    return lambda facts: {"r": min(most, facts.narrowest)}


def _virtual(facts: Facts) -> Options:
    return {"num_virtual_tokens": 20}


def _norms(facts: Facts) -> Options:
    return {"target_modules": [name for name, m in facts.model.named_modules() if "norm" in type(m).__name__.lower()]}


def _shira_count(options: Options, facts: Facts) -> int:
    """As many entries of W, anywhere, as a LoRA of rank r has."""
    facts.refuse_transposed()
    if options["r"] > _shira(10**9, facts)["r"]:
        raise ValueError(f"peft:shira: r {options['r']} trains more than there is in a layer")
    return sum(options["r"] * (x.in_features + x.out_features) for x in facts.layers)


def _shira(most: int, facts: Facts) -> Options:
    return {"r": min(most, *(x.in_features * x.out_features // (x.in_features + x.out_features) for x in facts.layers))}


def _frod_count(options: Options, facts: Facts) -> int:
    """A diagonal of the input's width, and a share of the entries beside it."""
    squares = ((x.in_features, x.in_features**2) for x in facts.layers)
    return sum(n + min(int(square * options["sparse_rate"]), square - n) for n, square in squares)


def _adamss_count(options: Options, facts: Facts) -> int:
    """K subspaces of rank ρ: K·ρ·r for all A, out·ρ for all B, with r at most the rank of W beside its bias. Clusters that
    are smaller than ρ have less: what was really found, `trained` says."""
    facts.refuse_transposed()
    rank, many = options.get("subspace_rank", 1), options.get("num_subspaces", 5)
    biased = [x.in_features + (facts.model.get_submodule(x.name).bias is not None) for x in facts.layers]
    return sum(rank * (many * min(options["r"], x.out_features, wide) + x.out_features)
               for x, wide in zip(facts.layers, biased, strict=True))


def _spectrum_count(options: Options, facts: Facts) -> int | None:
    """n_frequency coefficients of every layer."""
    if options.get("proportional_parameters") or options.get("n_frequency_pattern"):
        return None
    n, smallest = options["n_frequency"], min(x.in_features * x.out_features for x in facts.layers)
    if n > smallest:
        raise ValueError(f"n_frequency {n} is more than the {smallest} entries of the smallest layer")
    return n * len(facts.layers)


def _boft_count(options: Options, facts: Facts) -> int | None:
    """Blocks of b x b along the input, and a scale per output. More butterfly factors take peft's CUDA kernel: ask peft."""
    size = options.get("boft_block_size")
    if not size or options.get("boft_block_num") or options.get("boft_n_butterfly_factor", 1) > 1:
        return None
    return sum(x.in_features * size + x.out_features for x in facts.layers)


def _vectors_count(per_rank: int) -> Callable[[Options, Facts], int]:
    """A vector of `per_rank` times the rank and one of the output's width per layer; the projections are frozen."""
    return lambda options, facts: sum(per_rank * options.get("r", 256) + x.out_features for x in facts.layers)


def _randlora_count(options: Options, facts: Facts) -> int:
    """Per layer of narrow side n: ceil(n / r) bases, each with a diagonal of r and one of n."""
    narrow = [min(x.in_features, x.out_features) for x in facts.layers]
    return sum(ceil(n / options["r"]) * (options["r"] + n) for n in narrow)


def _osf(size: int, facts: Facts) -> Options:
    """Of every layer the `size` weakest singular directions are trained."""
    kept = {x.name.replace(".", r"\."): max(1, min(x.in_features, x.out_features) - size) for x in facts.layers}
    return {"rank_pattern": kept}


def _randlora(size: int, facts: Facts) -> Options:
    """`size` random bases span the narrow side of the widest layer."""
    widest = max(min(x.in_features, x.out_features) for x in facts.layers)
    return {"r": ceil(widest / size)}


CAUSAL = ("causal",)

#: What AdaLoRA's allocator of ranks remembers from step to step, by tensor.
IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")

TUNERS = (
    # Low rank and relatives.
    Tuner("lora", "LoRA", "LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685", 2021, sized=_is("r")),
    Tuner("adalora", "AdaLoRA", "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "2303.10512",
          2023, options=lambda facts: {"total_step": 10**9},  # the run's own length, once it is known
          sized=lambda size, facts: {"init_r": size, "target_r": ceil(size * 2 / 3)}),
    Tuner("delora", "DeLoRA", "Decoupling Angles and Strength in Low-rank Adaptation", "2503.18225", 2025,
          sized=_is("r")),
    Tuner("gralora", "GraLoRA", "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
          "2505.20355", 2025, sized=lambda size, facts: {"r": 2 * size}),  # r is a multiple of gralora_k, which is 2
    Tuner("hira", "HiRA", "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", None, 2025,
          sized=_is("r")),
    Tuner("lily", "Lily", "Low-Rank Interconnected Adaptation across Layers", "2407.09946", 2024, sized=_is("r")),
    Tuner("loha", "LoHa", "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
          "2108.06098", 2021, sized=_is("r")),
    Tuner("lokr", "LoKr", "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
          "2309.14859", 2023, sized=_is("r")),
    Tuner("deft", "DEFT", "DEFT: Decompositional Efficient Fine-Tuning", None, 2025, sized=_is("r")),
    Tuner("miss", "MiSS", "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
          "2409.15371", 2024, options=_rank(64), sized=_is("r")),
    Tuner("randlora", "RandLoRA", "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", "2502.00987",
          2025, options=_rank(32), sized=_randlora, count=_randlora_count),
    Tuner("adamss", "AdaMSS", "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", None, 2025,
          options=_rank(100), sized=_is("subspace_rank"), count=_adamss_count, resumes=False),
    Tuner("glora", "GLoRA", "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", "2306.07967", 2023,
          sized=_is("r")),
    Tuner("psoft", "PSOFT", "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", "2505.11235", 2025,
          options=_rank(32), sized=_is("r")),
    Tuner("peanut", "PEANuT", "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", "2410.01870",
          2024, sized=_is("r")),
    Tuner("osf", "OSF", "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", "2504.07097",
          2025, sized=_osf),
    Tuner("tinylora", "TinyLoRA", "Learning to Reason in 13 Parameters", "2602.04118", 2026, sized=_is("u")),
    # Shared frozen factors, vector banks.
    Tuner("vera", "VeRA", "VeRA: Vector-based Random Matrix Adaptation", "2310.11454", 2023, sized=_is("r"),
          count=_vectors_count(1)),
    Tuner("pvera", "PVeRA", "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation", "2512.07703", 2025,
          sized=_is("r"), count=_vectors_count(2)),
    Tuner("vblora", "VB-LoRA", "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", "2405.15179", 2024,
          options=lambda facts: {"vector_length": facts.block(256)}, sized=_is("num_vectors")),
    Tuner("unilora", "Uni-LoRA", "Uni-LoRA: One Vector is All You Need", "2506.00799", 2025,
          sized=_is("theta_d_length")),
    # Spectral, structured.
    Tuner("fourierft", "FourierFT", "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", "2405.03003", 2024,
          options=lambda facts: {"n_frequency": min(1000, facts.narrowest**2)}, sized=_is("n_frequency"),
          count=_spectrum_count),
    Tuner("waveft", "WaveFT", "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", "2505.12532", 2025,
          options=lambda facts: {"n_frequency": min(2592, facts.narrowest**2)}, sized=_is("n_frequency"),
          count=_spectrum_count),
    Tuner("c3a", "C3A", "Parameter-Efficient Fine-Tuning via Circular Convolution", "2407.19342", 2024,
          options=lambda facts: {"block_size": facts.block(256)}, sized=_is("block_size"), sizes=Facts.blocks),
    Tuner("frod", "FRoD", "FRoD (AAAI 2026, doi 10.1609/aaai.v40i31.39813)", None, 2026,
          options=lambda facts: {"sparse_rate": 0.01, "progressbar": False}, count=_frod_count,
          # entries beside the diagonal of the narrowest input
          sized=lambda size, facts: {"sparse_rate": (size + 0.5) / min(x.in_features for x in facts.layers) ** 2}),
    # Rotations.
    Tuner("oft", "OFT", "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", "2306.07280", 2023,
          options=lambda facts: {"oft_block_size": facts.block(32, outputs=False)}, sized=_is("oft_block_size"),
          sizes=lambda facts: [size for size in facts.blocks(outputs=False) if size > 1]),
    Tuner("boft", "BOFT", "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", "2311.06243", 2023,
          options=lambda facts: {"boft_block_size": facts.block(4, outputs=False)}, sized=_is("boft_block_size"),
          sizes=lambda facts: facts.blocks(outputs=False), count=_boft_count),
    Tuner("hra", "HRA", "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
          "2405.17484", 2024, sized=lambda size, facts: {"r": size}),
    Tuner("road", "RoAd", "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
          "2409.00119", 2024, options=lambda facts: {"group_size": facts.block(64, inputs=False)}),
    # Sparse, scaling, biases, norms.
    Tuner("shira", "SHiRA", "Sparse High Rank Adapters", "2406.13175", 2024, options=lambda facts: _shira(32, facts),
          sized=_is("r"), count=_shira_count),
    Tuner("supertuning", "Super-Tuning", "Super-Tuning", "2607.09287", 2026,
          sized=lambda size, facts: {"sparsity": 1 - (size + 0.5) / facts.smallest},  # entries of the smallest layer
          options=lambda facts: {"sparsity": min(0.99, 1 - 1.5 / facts.smallest)}),
    Tuner("ia3", "IA3", "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
          "2205.05638", 2022, options=lambda facts: {"feedforward_modules": [
              x.name for x in facts.layers if x.in_features > min(y.in_features for y in facts.layers)]}),
    Tuner("beft", "BEFT", "BEFT: Bias-Efficient Fine-Tuning of Language Models", "2509.15974", 2025),
    Tuner("ln_tuning", "LN tuning", "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
          "2312.11420", 2023, options=_norms, linear=False),
    Tuner("trainable_tokens", "Trainable tokens", "Trainable tokens (peft documentation)", None, None, linear=False,
          options=lambda facts: {"token_indices": list(range(min(100, facts.model.config.vocab_size)))},
          sized=lambda size, facts: {"token_indices": _tokens(size, facts)}),
    # Prompt-like.
    Tuner("prompt_tuning", "Prompt tuning", "The Power of Scale for Parameter-Efficient Prompt Tuning", "2104.08691", 2021,
          options=_virtual, sized=_is("num_virtual_tokens"), linear=False),
    Tuner("prefix_tuning", "Prefix tuning", "Prefix-Tuning: Optimizing Continuous Prompts for Generation", "2101.00190",
          2021, options=_virtual, sized=_is("num_virtual_tokens"), linear=False),
    Tuner("p_tuning", "P-tuning", "GPT Understands, Too", "2103.10385", 2021, options=_virtual,
          sized=_is("encoder_hidden_size"), linear=False),
    Tuner("cartridge", "Cartridge", "Cartridges: Lightweight and general-purpose long context representations via "
          "self-study", "2506.06266", 2025, options=_virtual, linear=False,
          sized=lambda size, facts: {"num_virtual_tokens": size + 1}),  # the first one is frozen
    Tuner("adaption_prompt", "LLaMA-Adapter", "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init "
          "Attention", "2303.16199", 2023, bases=CAUSAL, linear=False, sized=_is("adapter_len"),
          options=lambda facts: {"adapter_len": 10, "adapter_layers": facts.depth}),
    Tuner("cpt", "CPT", "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods",
          "2410.17222", 2024, bases=CAUSAL, linear=False, options=lambda facts: _context(range(20)),
          sized=lambda size, facts: _context(range(size))),
    Tuner("multitask_prompt_tuning", "Multitask prompt tuning", "Multitask Prompt Tuning Enables Parameter-Efficient "
          "Transfer Learning", "2303.02861", 2023, options=_virtual, sized=_is("num_virtual_tokens"), linear=False,
          refused="it learns one prompt for several tasks and wants the task's number with every batch; a run here has one "
                  "task"),
    # Mixtures, side networks.
    Tuner("xlora", "X-LoRA", "X-LoRA: Mixture of Low-Rank Adapter Experts", "2402.07148", 2024, linear=False,
          refused="it mixes LoRA adapters that were trained before and are read from disk; a run here starts from the base"),
    Tuner("poly", "Poly", "Combining Modular Skills in Multitask Learning", "2202.13914", 2022, sized=_is("r"),
          refused="its router wants the task's number with every batch; a run here has one task"),
    Tuner("shadow", "ShadowPEFT", "ShadowPEFT", "2604.19254", 2026, bases=CAUSAL, linear=False),
)


def _tokens(size: int, facts: Facts) -> list[int]:
    """As many tokens; which ones follows from the data (`PeftTuner.prepare`)."""
    if size > facts.model.config.vocab_size:
        raise ValueError(f"the base has {facts.model.config.vocab_size} tokens, not {size}")
    return list(range(size))


def _context(tokens: Iterable[int]) -> Options:
    """CPT's context: tokens, all of them trained, each of them input (type 1 of its 4)."""
    found = list(tokens)
    return {"cpt_token_ids": found, "cpt_mask": [1] * len(found), "cpt_tokens_type_mask": [1] * len(found)}


class PeftTuner(Method["PeftTuner.Config"]):
    """A tuner of peft. `tuner` says which; one subclass each is made below."""

    tuner: ClassVar[Tuner]
    packs = False
    trains = "foreign"
    spoils_base = True

    class Config(MethodConfig):
        """`options` go to peft's config class of the type. `size` sets the tuner's size (None: peft's own).

        `data_batches` of `data_batch_size` training items are read by what starts from data: LoRA's `eva`, `corda` and
        `lora_ga`, trainable tokens (the most frequent ones), and CPT (its context).
        """

        tuner: ClassVar[Tuner]
        options: Options = Field(default_factory=dict)
        size: PositiveInt | None = None
        data_batches: PositiveInt = 8
        data_batch_size: PositiveInt = 16

        @model_validator(mode="after")
        def _peft_takes_the_options(self) -> PeftTuner.Config:
            if self.options:
                _check_options(self.tuner, self.options)
            return self

    def trainable(self, config: Any, shapes: Shapes) -> int:
        """What peft makes trainable on a base without memory, or the closed form. Raises `ValueError` where it cannot."""
        return _counted(self.tuner, json.dumps(config.options), config.size, shapes)

    def trained(self, config: Any, shapes: Shapes, prepared: Any) -> int:
        """What was trained: data may have moved ranks."""
        if prepared is None:
            return self.trainable(config, shapes)
        return prepared.trained_scalars

    def solve(self, config: Any, shapes: Shapes, parameters: int) -> Any:
        """The size whose count is nearest: of the sizes there are; or at once, where the count is a straight line."""

        def count(size: int) -> int:
            return self.trainable(self.resized(config, size), shapes)

        if self.tuner.sizes is not None:
            sizes = self.tuner.sizes(_facts(shapes))
            return self.resized(config, min(sizes, key=lambda size: abs(count(size) - parameters)))
        first, slope = count(1), count(2) - count(1)
        guess = max(1, 1 + round((parameters - first) / slope)) if slope > 0 else 1
        try:
            if slope > 0 and abs(count(guess) - parameters) <= slope / 2:
                return self.resized(config, guess)
        except ValueError:
            pass  # too large: the search finds the largest
        return super().solve(config, shapes, parameters)

    def check(self, config: Any, shapes: Shapes) -> None:
        if self.trainable(config, shapes) == 0:
            raise ValueError(f"{self.id}: peft trains nothing on this base")

    def skip(self, base_kind: str, task_kind: str) -> str | None:
        if self.tuner.refused is not None:
            return self.tuner.refused
        if base_kind not in self.tuner.bases:
            return f"peft's {self.tuner.kind} works on {one_of(self.tuner.bases)} bases only"
        return None

    def prepare(self, config: Any, context: Context) -> Preparation:
        """The peft model around the base. Its draws, dropout included, depend on the run's seed alone."""
        from peft import get_peft_model

        base = context.model
        facts = Facts(context.shapes.layers, base)
        frozen = {id(module) for module in base.modules()}
        options = _options(self.tuner, config.options, config.size, facts) | self._from_data(config, context)
        made = _peft_config(self.tuner, options, base)
        with torch.random.fork_rng(), _quiet():
            torch.manual_seed(context.seed)
            _before(made, config, context)
            model = get_peft_model(base, made)
            _after(model, made, config, context)
        torch.manual_seed(context.seed)
        model.trained_scalars = sum(p.numel() for p in model.parameters() if p.requires_grad)  # frozen when it is detached
        model.eval()
        for module in model.modules():  # the tuner's dropout and sampling are on in training; the base's are not
            module.training = id(module) not in frozen
        return Preparation(model)

    def _from_data(self, config: Any, context: Context) -> Options:
        """Tokens that the tuner trains, chosen from the data where the user has not."""
        key = {"trainable_tokens": "token_indices", "cpt": "cpt_token_ids"}.get(self.tuner.kind)
        if key is None or key in config.options:
            return {}
        wanted = len(_options(self.tuner, config.options, config.size, Facts(context.shapes.layers, context.model))[key])
        rows = [row[keep.bool()].tolist() for batch in context.batches(_request(config))
                for row, keep in zip(batch.tokens, batch.mask, strict=True)]
        flat = [token for row in rows for token in row]
        if self.tuner.kind == "cpt":
            return _context((flat * ceil(wanted / len(flat)))[:wanted])
        seen = [token for token, _ in Counter(flat).most_common(wanted)]
        unseen = (token for token in range(context.model.config.vocab_size) if token not in set(seen))
        return {key: seen + [next(unseen) for _ in range(wanted - len(seen))]}

    def penalty(self, model: Any) -> Tensor | None:
        """AdaLoRA (eq. 3): `orth_reg_weight` times the mean of |Pᵀ P - I| and |Q Qᵀ - I| over all factors, `[1]`."""
        if self.tuner.kind != "adalora":
            return None
        weight = model.active_peft_config.orth_reg_weight
        named = [(name, p) for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
        factors = [p if "lora_A" in name else p.mT for name, p in named]
        return weight * torch.stack([torch.dist(p @ p.mT, torch.eye(len(p)).to(p)) for p in factors]).mean().view(1)

    def stepped(self, model: Any, step: int, steps: int) -> None:
        """AdaLoRA and AdaMSS move their ranks after every update."""
        if self.tuner.kind in ("adalora", "adamss"):
            made = model.active_peft_config
            if getattr(made, "total_step", 0) == 10**9:
                made.total_step = steps
            model.base_model.update_and_allocate(step)

    def snapshot(self, model: Any) -> dict[str, Tensor]:
        """Of AdaLoRA its counts of ranks, its averages of importance and the ranks that it keeps."""
        if self.tuner.kind != "adalora":
            return {}
        found = {f"rank/{name}": parameter.data for name, parameter in model.named_parameters() if "ranknum" in name}
        for kind in IMPORTANCES:
            found |= {f"{kind}/{name}": value for name, value in getattr(model.base_model.rankallocator, kind).items()}
        pattern = model.active_peft_config.rank_pattern or {}
        return found | {f"pattern/{name}": torch.tensor(kept) for name, kept in pattern.items()}

    def restore(self, model: Any, tensors: Mapping[str, Tensor]) -> None:
        pattern: dict[str, list[bool]] = {}
        place = next(model.parameters()).device
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "rank":
                model.get_parameter(name).data.copy_(value)
            elif kind == "pattern":
                pattern[name] = value.tolist()
            else:
                getattr(model.base_model.rankallocator, kind)[name] = value.to(place, copy=True)
        model.active_peft_config.rank_pattern = pattern or None

    def end(self, model: Any) -> None:
        model.eval()


def _facts(shapes: Shapes) -> Facts:
    if shapes.skeleton is None:
        raise ValueError("peft counts its parameters on the base's modules, of which only layer shapes are known here")
    return Facts(shapes.layers, shapes.skeleton())


@lru_cache(maxsize=4096)
def _counted(tuner: Tuner, options_json: str, size: int | None, shapes: Shapes) -> int:
    facts = _facts(shapes)
    if not facts.layers:
        raise ValueError("this base has no linear layer that could be adapted")
    options = _options(tuner, json.loads(options_json), size, facts)
    _leave_positions(tuner, options, facts)
    try:
        return _count_of(tuner, options, facts)
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError, AssertionError) as error:
        raise ValueError(f"peft:{tuner.kind} cannot be built on this base: {_first_line(error)}") from None


def _leave_positions(tuner: Tuner, options: Options, facts: Facts) -> None:
    """Raise `ValueError` where virtual tokens take more than half of the places that the base has."""
    virtual = options.get("num_virtual_tokens", len(options.get("cpt_token_ids", ())))
    places = getattr(facts.model.config, "max_position_embeddings", None)
    if places is not None and virtual > places // 2:
        raise ValueError(f"peft:{tuner.kind}: {virtual} virtual tokens leave too few of the base's {places} positions")


def _count_of(tuner: Tuner, options: Options, facts: Facts) -> int:
    from peft import get_peft_model

    if tuner.count is not None and set(options.get("target_modules", facts.names)) == set(facts.names):
        count = tuner.count(options, facts)
        if count is not None:
            return count
    # Starts from data or from decompositions change no shape. MiCA's freezes B.
    start = options.get("init_lora_weights")
    plain = options | ({} if start is None else {"init_lora_weights": True})
    with torch.random.fork_rng(devices=[]), _quiet():
        model = get_peft_model(facts.model, _peft_config(tuner, plain, facts.model))
    # On meta, moving AdaLoRA's frozen counter of ranks makes it trainable.
    frozen = ("ranknum", "lora_B") if start == "mica" else ("ranknum",)
    return sum(p.numel() for name, p in model.named_parameters()
               if p.requires_grad and not any(part in name for part in frozen))


def _options(tuner: Tuner, given: Options, size: int | None, facts: Facts) -> Options:
    """Defaults, then what the user gives, then what the size sets."""
    options = {"target_modules": facts.names} if tuner.linear else {}
    options |= tuner.options(facts) | given
    if size is not None:
        assert tuner.sized is not None
        options |= tuner.sized(size, facts)
    return options


def _config_class(tuner: Tuner) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(tuner.kind.upper())]


def _peft_config(tuner: Tuner, options: Options, model: Any) -> Any:
    """Peft's config of the type, for the base's kind. A mapping given for a config within the config becomes one."""
    cls = _config_class(tuner)
    kind = "FEATURE_EXTRACTION" if model.get_output_embeddings() is None else "CAUSAL_LM"
    kind = "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else kind
    return cls(**_nested(cls, options), **({} if "task_type" in options else {"task_type": kind}))


def _nested(cls: Any, options: Options) -> Options:
    hints = typing.get_type_hints(cls)
    found = dict(options)
    for key, value in options.items():
        inner = [one for one in typing.get_args(hints.get(key)) if dataclasses.is_dataclass(one)]
        if isinstance(value, dict) and inner:
            found[key] = inner[0](**value)  # type: ignore[operator]
    return found


def _check_options(tuner: Tuner, options: Options) -> None:
    """Raise `ValueError` with one sentence when peft's config class does not take the options."""
    cls = _config_class(tuner)
    keys = sorted(field.name for field in dataclasses.fields(cls))
    for key in options:
        if key not in keys:
            raise ValueError(f"peft:{tuner.kind} has no option {key!r}; use {one_of(keys)}")
    needed: Options = {"adalora": {"total_step": 10**9}, "cpt": _context([0])}.get(tuner.kind, {})
    try:
        with _quiet():
            cls(**{**needed, "task_type": "CAUSAL_LM", **_nested(cls, options)})
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"peft:{tuner.kind} does not take these options: {_first_line(error)}") from None


def _request(config: Any) -> GradientRequest:
    return GradientRequest(config.data_batches, config.data_batch_size)


def _before(made: Any, config: Any, context: Context) -> None:
    """What LoRA's starts from data look at before the model is built: CorDA at activations, LoRA-GA at gradients."""
    start = getattr(made, "init_lora_weights", None)
    if start == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        made.corda_config = made.corda_config or CordaConfig()

        def read() -> None:
            with torch.no_grad():
                for batch in context.batches(GradientRequest(config.data_batches * config.data_batch_size, 1)):
                    context.loss(context.model, batch)  # item by item, as peft's covariance wants them

        preprocess_corda(context.model, made, run_model=read)
    elif start == "lora_ga":
        from peft.tuners.lora.config import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga

        made.lora_ga_config = made.lora_ga_config or LoraGAConfig()

        def step() -> None:
            context.model.eval()
            for batch in context.batches(_request(config)):
                context.loss(context.model, batch).sum().backward()

        preprocess_loraga(context.model, made, train_step=step)


def _after(model: Any, made: Any, config: Any, context: Context) -> None:
    """EVA looks at activations once the model is built."""
    if getattr(made, "init_lora_weights", None) != "eva":
        return
    from peft import initialize_lora_eva_weights

    batches = [{"input_ids": batch.tokens, "attention_mask": batch.mask} for batch in context.batches(_request(config))]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _method(tuner: Tuner) -> PeftTuner:
    """The method of a tuner: a class of its own, since what a method is stands on its class."""
    config = type(f"{tuner.label}Config", (PeftTuner.Config,), {"tuner": tuner, "__doc__": PeftTuner.Config.__doc__})
    facts: dict[str, Any] = {"id": f"peft:{tuner.kind}", "label": f"{tuner.label} (peft)", "tuner": tuner, "Config": config,
                             "paper": Paper(tuner.title, tuner.arxiv, tuner.year), "size": "size" if tuner.sized else None,
                             "resumes": tuner.resumes}
    made: type[PeftTuner] = type(f"Peft{tuner.label}", (PeftTuner,), facts)
    return made()


METHODS = [_method(tuner) for tuner in TUNERS]
