"""LoRAs of a pipeline: add, save and load them bit for bit, export and verify them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import ModelMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..errors import TrainingError
from ..files import replacing
from . import files
from .files import Layer

NAME = "default"
WEIGHTS = "pytorch_lora_weights.safetensors"


class Adapter:
    """LoRAs in models of a pipeline, with weights in float32 whatever the precision of the models.

    Args:
        pipeline: diffusers pipeline with frozen models.
        targets: name of a model in the pipeline -> names of its layers that get a LoRA, or keywords of `LoraConfig`.
        seed: of the initial weights.
        options: keywords of `LoraConfig` for all models, such as r and lora_alpha.
    """

    def __init__(self, pipeline, targets: Mapping[str, list[str] | dict[str, Any]], seed: int, **options):
        self.pipeline, self.targets = pipeline, targets
        set_seed(seed)  # the initial weights must not depend on what was loaded before
        for name, target in targets.items():
            model = getattr(pipeline, name)
            target = target if isinstance(target, dict) else {"target_modules": target}
            config = LoraConfig(init_lora_weights="gaussian", **options, **target)
            if isinstance(model, ModelMixin):
                model.add_adapter(config, adapter_name=NAME)
            else:  # of transformers, whose add_adapter requires a PEFT that is not released
                inject_adapter_in_model(config, model, NAME)
            cast_training_params(model, dtype=torch.float32)

    @classmethod
    def of_layers(cls, pipeline, layers: Mapping[str, Layer]) -> "Adapter":
        """Add the LoRAs of a file, with its ranks and alphas; `InputError` if they are not of this pipeline."""
        config = files.peft_config(layers)
        names = sorted({module.split(".")[0] for module in layers})
        files.check_model(layers, {name: getattr(pipeline, name) for name in names})
        targets = {
            name: {key.removeprefix(f"{name}."): x for key, x in config.items() if key.startswith(f"{name}.")}
            for name in names
        }
        adapter = cls(pipeline, targets, seed=0)
        adapter.set_layers(layers)
        return adapter

    @property
    def models(self) -> dict[str, Any]:
        """Models that have the adapter, by name."""
        models = {name: getattr(self.pipeline, name) for name in self.targets}
        return {name: model for name, model in models.items() if NAME in getattr(model, "peft_config", {})}

    def parameters(self, *names: str) -> list[torch.nn.Parameter]:
        """Trained weights of all models, or of the named ones."""
        models = [self.models[name] for name in names or self.targets]
        return [weight for model in models for weight in model.parameters() if weight.requires_grad]

    def layers(self) -> dict[str, Layer]:
        """Trained layers by module, with their alpha."""
        layers = {}
        for name, model in self.models.items():
            weights = get_peft_model_state_dict(model, adapter_name=NAME)
            keys = ("lora_alpha", "alpha_pattern", "use_rslora")
            config = {f"{name}.{key}": getattr(model.peft_config[NAME], key) for key in keys}
            trained = files.to_layers({f"{name}.{key}": weight for key, weight in weights.items()})
            layers |= files.with_alphas(trained, config)
        return layers

    def save(self, folder: str | Path) -> None:
        """Write the adapter so that a resume continues bit for bit."""
        files.write_diffusers(Path(folder, WEIGHTS), self.layers())

    def load(self, folder: str | Path) -> None:
        """Load an adapter written by `save`."""
        self.set_layers(files.read(Path(folder, WEIGHTS)).layers)

    def set_layers(self, layers: Mapping[str, Layer]) -> None:
        """Set the weights to those of `layers`, whose alphas must be those of the adapter."""
        for name, model in self.models.items():
            weights = {}
            for key in get_peft_model_state_dict(model, adapter_name=NAME):
                module, part = files.locate(f"{name}.{key}")
                weights[key] = getattr(layers[module], part)
            set_peft_model_state_dict(model, weights, adapter_name=NAME)
            cast_training_params(model, dtype=torch.float32)

    def export(self, folder: str | Path, kohya_weights: str, metadata: dict[str, str]) -> None:
        """Write WEIGHTS for diffusers, its alpha folded into the weights, and `kohya_weights` for other programs."""
        layers = self.layers()
        with replacing(folder) as partial:
            files.write_diffusers(partial / WEIGHTS, {name: layer.folded() for name, layer in layers.items()})
            files.write_kohya(partial / kohya_weights, layers, metadata)

    @torch.no_grad()
    def verify(self, folder: str | Path, predict: Callable[[], list[Tensor]]) -> None:
        """Load the exported WEIGHTS as a user would; TrainingError unless all modules load and predict the same.

        Args:
            predict: returns predictions of the pipeline's models for a fixed input.
        """
        count, trained = self._count(), predict()
        if not all(output.isfinite().all() for output in trained):
            raise TrainingError("the trained model predicts values that are not finite: lower `learning_rate`")
        self.pipeline.disable_lora()
        base = predict()
        self.pipeline.enable_lora()
        self.pipeline.delete_adapters(NAME)
        self.pipeline.load_lora_weights(folder, weight_name=WEIGHTS, adapter_name=NAME)
        path = Path(folder, WEIGHTS)
        if all(map(torch.equal, trained, base)):
            raise TrainingError(
                f"{path} changes nothing: the learning rate or the weights of the losses are too small to train it"
            )
        if self._count() != count:
            raise TrainingError(
                f"{path} does not load as it was trained: {self._count()} of {count} modules came back"
            )
        for expected, reloaded in zip(trained, predict(), strict=True):
            if not torch.allclose(reloaded, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
                difference = float((reloaded - expected).abs().max())
                raise TrainingError(
                    f"{path} loads but predicts differently from the trained model, by up to {difference:.3g}"
                )

    def _count(self) -> int:
        modules = [module for model in self.models.values() for module in model.modules()]
        return sum(isinstance(module, LoraLayer) and NAME in module.lora_A for module in modules)
