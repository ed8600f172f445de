"""The config with the commits of all that a run reads from the hub: what it keeps."""

import dataclasses

from rcpo.config.resolved import ResolvedConfig
from rcpo.models.hub import commit_of, commit_of_adapter, is_hub_id
from rcpo.records.hub import commit_of_questions, revisions_at_commits


def at_commit(config: ResolvedConfig) -> ResolvedConfig:
    """`config` with model.revision, reference.revision, model.lora.adapter_revision, data.revision and
    evaluation.questions_revision as commits. Raises UserError where the hub has none and none is here."""
    model, reference, lora = config.model, config.reference, config.model.lora
    if is_hub_id(model.path):
        model = dataclasses.replace(model, revision=commit_of(model.path, model.revision))
    if lora.adapter is not None and is_hub_id(lora.adapter):
        commit = commit_of_adapter(lora.adapter, lora.adapter_revision)
        model = dataclasses.replace(model, lora=dataclasses.replace(lora, adapter_revision=commit))
    is_read = reference.path is not None and config.objective_function.needs_reference
    if is_read and is_hub_id(str(reference.path)):
        commit = commit_of(str(reference.path), reference.revision)
        reference = dataclasses.replace(reference, revision=commit)
    data = dataclasses.replace(config.data, revision=revisions_at_commits(config.data))
    evaluation = config.evaluation
    asked = commit_of_questions(evaluation) if config.train.evaluate is not None else None
    if asked is not None:
        evaluation = dataclasses.replace(evaluation, questions_revision=asked)
    return dataclasses.replace(config, model=model, reference=reference, data=data, evaluation=evaluation)
