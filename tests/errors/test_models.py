"""Models that cannot be trained."""

import pickle
from collections.abc import Callable

import pytest

from support.mistakes import (
    TRAIN,
    WEIGHTS,
    Mistake,
    code_in_a_checkpoint,
    mistakes,
    pipeline,
    removed,
    tensors,
    written,
)

SD = "an SD 1.x / 2.x text-to-image StableDiffusionPipeline is accepted"
MODELS = [
    Mistake("no model", TRAIN + "--model.path none", "model.path is 'none', but there is no such folder or file."),
    Mistake(
        "folder that is no pipeline",
        TRAIN + "--model.path model",
        f"model.path is 'model', where there is no model_index.json; {SD}.",
        {"model/readme.txt": "nothing"},
    ),
    Mistake(
        "hub out of reach",
        TRAIN + "--model.path someone/model",
        "model.path is 'someone/model', but there is no such folder, the Hugging Face hub cannot be reached, ...",
    ),
    Mistake(
        "SDXL",
        TRAIN + "--model.path model",
        "model.path is 'model', a StableDiffusionXLPipeline: it has two text encoders and added time conditions; "
        f"{SD}.",
        given=(pipeline("model_index.json", _class_name="StableDiffusionXLPipeline"),),
    ),
    Mistake(
        "SD3",
        TRAIN + "--model.path model",
        f"model.path is 'model', a StableDiffusion3Pipeline: it is a transformer trained with flow matching; {SD}.",
        given=(pipeline("model_index.json", _class_name="StableDiffusion3Pipeline"),),
    ),
    Mistake(
        "inpainting UNet",
        TRAIN + "--model.path model",
        "model.path is 'model', whose UNet is an inpainting one, which also takes a mask and the masked image (9 "
        "channels); a text-to-image UNet takes 4.",
        given=(pipeline("unet/config.json", in_channels=9),),
    ),
    Mistake(
        "pipeline without weights",
        TRAIN + "--model.path model",
        "model.path is 'model', where the weights of unet (.safetensors) are missing.",
        given=(pipeline(), removed(f"model/{WEIGHTS}")),
    ),
    Mistake(
        "damaged pipeline",
        TRAIN + "--model.path model",
        f"model.path is 'model/{WEIGHTS}', which is not a whole safetensors file (...); download or write it again.",
        given=(pipeline(), written(f"model/{WEIGHTS}", bytes(100))),
    ),
    Mistake(
        "page in place of a pipeline's weights",
        TRAIN + "--model.path model",
        f"model.path is 'model/{WEIGHTS}', a web page, not weights; download the file itself.",
        given=(pipeline(), written(f"model/{WEIGHTS}", b"<html>not found</html>")),
    ),
    Mistake(
        "no file of a UNet",
        TRAIN + "--model.path shapes --model.unet esd.safetensors",
        "model.unet is 'esd.safetensors', but there is no such file.",
    ),
    Mistake(
        "UNet without a size",
        TRAIN + "--model.path model",
        "model.path is 'model', whose unet/config.json has sample_size = None, so that nothing says how large its "
        "images are; accepted is the side of its latents, such as 64 for images of 512 pixels, or [height, width].",
        given=(pipeline("unet/config.json", sample_size=None),),
    ),
    Mistake(
        "weights of another UNet",
        TRAIN + "--model.path model",
        "model.path is 'model', whose UNet is of another architecture than that of its config: ... is ..., and ... in "
        "its config.",
        given=(pipeline("unet/config.json", layers_per_block=2),),
    ),
    Mistake(
        "damaged tokenizer",
        TRAIN + "--model.path model",
        "model.path is 'model', whose tokenizer cannot be loaded: ...",
        given=(pipeline(), written("model/tokenizer/tokenizer_config.json", b"{")),
        loaded="model",
    ),
    Mistake(
        "thresholding",
        TRAIN + "--model.path model",
        "scheduler/scheduler_config.json: thresholding is true; only false is accepted, since such a step is not "
        "Gaussian.",
        given=(pipeline("scheduler/scheduler_config.json", thresholding=True),),
    ),
    Mistake(
        "prediction type",
        TRAIN + "--model.path model",
        "scheduler/scheduler_config.json: prediction_type is 'sample'; epsilon or v_prediction is accepted.",
        given=(pipeline("scheduler/scheduler_config.json", prediction_type="sample"),),
    ),
    Mistake(
        "scheduler",
        TRAIN + "--model.path model",
        "scheduler/scheduler_config.json: _class_name is 'LCMScheduler'; accepted are the configs of DDIMScheduler, "
        "PNDMScheduler, ...",
        given=(pipeline("scheduler/scheduler_config.json", _class_name="LCMScheduler"),),
    ),
    Mistake(
        "config of a folder",
        TRAIN + "--model.config model",
        "model.config is 'model', but model.path is '...', which has configs of its own; with a .safetensors or .ckpt "
        "file ...",
        given=(pipeline(),),
    ),
    Mistake(
        "LoRA for a model",
        TRAIN + "--model.path lora.safetensors",
        f"model.path is 'lora.safetensors', a file of a LoRA: it holds changes to a model, not a model; {SD}.",
        given=(tensors("lora.safetensors", "lora_unet_mid_block.lora_down.weight"),),
    ),
    Mistake(
        "damaged single file",
        TRAIN + "--model.path model.safetensors",
        "model.path is 'model.safetensors', a web page, not weights; download the file itself.",
        {"model.safetensors": "<html>not found</html>"},
    ),
    Mistake(
        "code in a single file",
        TRAIN + "--model.path model.ckpt",
        "model.path is 'model.ckpt', which holds more than tensors and would have to be executed to be read; ...",
        given=(code_in_a_checkpoint,),
    ),
    Mistake(
        "pickle",
        TRAIN + "--model.path model.ckpt",
        "model.path is 'model.ckpt', which is not a whole torch file; download or write it again.",
        {"model.ckpt": pickle.dumps({"weights": [1.0]}, protocol=4)},
    ),
    Mistake(
        "LoRA's targets",
        TRAIN + "--model.lora-rank 2 --model.lora-targets to_q to_kk",
        "model.lora_targets = 'to_kk': no such layers (did you mean to_k?); accepted are ends of names of ...",
    ),
    Mistake(
        "LoRA's alpha without a rank",
        TRAIN + "--model.lora-alpha 4",
        "model.lora_alpha = 4.0: accepted is 0 where model.lora_rank is 0.",
    ),
]


@pytest.mark.slow
@mistakes(*MODELS)
def test_a_mistake(mistake: Mistake, end: Callable[[Mistake], None]) -> None:
    end(mistake)
