"""Answers to the first held-out prompts, at the start and at each evaluation: metrics.answers.

Called by `rcpo.training.loop` on every rank. What an answer is, `rcpo.engine.answers` says; the file is of
`rcpo.runs.answers`.
"""

import logging
from typing import TYPE_CHECKING

from rcpo.data.template import ends_of_answers, look_at_template
from rcpo.engine.answers import greedy_answers
from rcpo.ranks.distributed import rank
from rcpo.runs.answers import append_answers

if TYPE_CHECKING:
    from rcpo.training.state import Training

logger = logging.getLogger(__name__)


def note_answers(training: "Training") -> None:
    """Answer the first metrics.answers held-out prompts and tell every sink, with the answers of the start
    beside them. Collective."""
    metrics, inputs = training.config.metrics, training.inputs
    if not metrics.answers:
        return
    tokenizer = inputs.tokenizer
    prompts = [pair.prompt_ids for pair in inputs.held_out[:: inputs.held_out_slots][: metrics.answers]]
    kwargs = training.config.model.chat_template_kwargs
    template = None if tokenizer.chat_template is None else look_at_template(tokenizer, kwargs)
    ends = ends_of_answers(tokenizer, template)
    # Below 3 every rank has whole weights, and one is enough; the others wait in their next collective.
    if training.engine.stage < 3 and rank() != 0:
        return
    answers = greedy_answers(training.engine, prompts, metrics.answer_tokens, ends, inputs.pad_id)
    if rank() != 0:
        return
    step = training.state.step
    prompt_texts, answer_texts = (
        [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in many] for many in (prompts, answers)
    )
    noted = append_answers(training.run, step, prompt_texts, answer_texts)
    for each in noted:
        logger.info("answer to held-out pair %d at step %d: %r", each.pair, step, each.now)
    for sink in training.sinks:
        sink.log_answers(noted)
