"""lm-eval's class for models of images and text, `hf-multimodal`, with the model and the processor that rcpo
has loaded.

lm-eval 0.4.13 makes the processor itself, with AutoProcessor, which builds none of families that take videos
too without torchvision; one that is handed over is not kept. Here it is rcpo's, made of its parts.
lm-eval is imported when a model is first asked."""

from typing import Any

from rcpo.data.generation import tokens_in_front
from rcpo.data.pictures import Sight, in_parts
from rcpo.evaluation.subject import Loaded
from rcpo.records.messages import PLACE


def seeing_model(loaded: Loaded, sight: Sight, batch: int, shows: bool) -> Any:
    """A loaded model that sees, for lm-eval: tasks that show images are answered, those of text alone are
    scored and answered as any model's. `shows`: whether the task's questions have images; else <image> is a
    word like others."""
    from lm_eval.models.hf_vlms import DEFAULT_IMAGE_PLACEHOLDER, HFMultimodalLM

    class SeeingLM(HFMultimodalLM):
        def _create_tokenizer(self, *args: Any, **kwargs: Any) -> None:
            self.processor, self.tokenizer = sight.processor, loaded.tokenizer

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """As in training: content in parts, with the run's model.chat_template_kwargs."""
            self.chat_applied = True
            if shows:
                chat_history = [
                    {**turn, "content": turn["content"].replace(DEFAULT_IMAGE_PLACEHOLDER, PLACE)}
                    for turn in chat_history
                ]
            return str(
                self.tokenizer.apply_chat_template(
                    in_parts(self.tokenizer, chat_history),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    **loaded.subject.model.chat_template_kwargs,
                )
            )

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            """Which one is applied, for lm-eval's record."""
            return str(self.tokenizer.chat_template) if chat_template else None

        def tok_batch_multimodal_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
            """Without a second BOS where the chat template has written one and the tokenizer does too, as
            lm-eval has it for text."""
            bos = self.tokenizer.bos_token
            if bos is not None and tokens_in_front(self.tokenizer):
                strings = [text.removeprefix(bos) for text in strings]
            return super().tok_batch_multimodal_encode(strings, *args, **kwargs)

    return SeeingLM(
        pretrained=loaded.model,
        image_string=sight.processor.image_token,
        convert_img_format=True,  # RGB, as in training
        batch_size=batch,
    )
