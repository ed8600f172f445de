"""One file a command: its words, flags and help (`add_arguments`), and the call into the room that does the
work (`run`). Holds no logic of its own, and imports nothing heavy before `run`: help and TAB are quick."""

COMMANDS = {
    "train": "train a model on preference pairs",
    "resume": "continue a run, or a sweep, from the newest checkpoints",
    "sweep": "train a grid of runs, here or by SLURM",
    "status": "what state the cells of a sweep are in",
    "cancel": "stop a sweep; its cells write a checkpoint first",
    "sync": "upload what W&B wrote offline",
    "export": "write a Hugging Face model folder from a checkpoint",
    "data": "what will be trained on: rows, lengths, pairs as the model sees them",
    "score": "what a model says of preference pairs before training",
    "weigh": "how likely responses are of a target distribution, for DoRA's weights",
    "generate": "a model's answers to prompts, as AlpacaEval, MT-Bench and Arena-Hard read them",
    "evaluate": "scores of runs and models on tasks: word problems, lm-eval's, your own",
    "judge": "which of two models' answers a judge prefers",
    "lab": "where probability goes in training: token by token, one-token answers, refusals",
    "compare": "runs side by side: a table, an HTML report, figures",
    "dashboard": "pages in W&B: a workspace, and a report with the table",
    "watch": "what runs are doing now, live",
    "bench": "how fast training is here, and what calibration costs",
    "doctor": "look at this machine: what it has, what it lacks, what to do",
    "completion": "print the shell code that completes rcpo's words on TAB",
}
