"""Flower's ClientApp of a site: takes a task from Flower and hands it to the site's worker, or carries it out itself.

Flower starts a process for every message of a deployment. This module imports next to nothing, so that such a process is
there quickly; torch, the model and the scans stay in the worker (`client.warm`), where the site's node config asks for one with
``warm=true``. Without, as in a simulation, whose processes last anyway, the task is carried out here. Behind the site's gate
(`client.supernode`) it is not used: the gate asks the worker itself.
"""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.jobs import Job
from core.faults import SiteError, incident

app = ClientApp()

TRAIN = ("pretrain", "finetune")
QUERIES = (
    *("describe", "constants", "inputs", "sums", "moments", "scanners", "hits", "validation", "embed", "predict"),
    *("features", "groups", "probes", "gradient", "errors", "scores"),
)


def handle(message: Message, context: Context) -> Message:
    """Answer one message; a failure is raised as a `core.faults.SiteError`, whose text may leave the site."""
    job = Job(
        message_type=message.metadata.message_type,
        received=message.content,
        node_config=context.node_config,
        run_config=context.run_config,
        run_id=context.run_id,
        memory=context.state,
    )
    try:
        answer = ask(job)
    except SiteError:
        raise
    except Exception:
        # Flower tells the server what an exception says.
        raise incident() from None
    return Message(content=answer, reply_to=message)


def ask(job: Job) -> RecordDict:
    """Have a task carried out: by the site's worker, or here."""
    if job.node_config.get("warm") is True:
        from client.warm import Asker, ask_worker

        return ask_worker(job, Asker.this_app())
    from client.tasks import carry_out

    return carry_out(job)


for name in TRAIN:
    app.train(name)(handle)
for name in QUERIES:
    app.query(name)(handle)
