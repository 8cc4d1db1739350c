"""A federation inside one process: the real apps, one site after the other, no Ray and no network; to test and to debug."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

Tamper = Callable[[Message, str], Message | None]


class InProcessGrid(Grid):
    """Flower's grid, synchronous: a message is answered by calling the site's ClientApp.

    Args:
        client: the ClientApp every node runs.
        node_configs: node config of each site, by Flower node number.
        run_config: what ``flwr run --run-config`` would pass.
        order: order in which nodes are listed and answer; theirs by number if not given.
        tamper: may change a reply, or drop it by returning None; gets the reply and the type of the message it answers.
    """

    def __init__(
        self,
        client: ClientApp,
        node_configs: Mapping[int, Mapping[str, str | int | bool | float]],
        run_config: Mapping[str, str],
        *,
        order: Sequence[int] | None = None,
        tamper: Tamper | None = None,
    ) -> None:
        self.client = client
        self.contexts = {
            node: Context(run_id=1, node_id=node, node_config=dict(config), state=RecordDict(), run_config=dict(run_config))
            for node, config in node_configs.items()
        }
        self.order = list(order or node_configs)
        self.tamper = tamper
        self.replies: list[Message] = []
        self.num_messages = 0
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run: object) -> None:
        """There is one run only."""

    @property
    def run(self) -> NoReturn:
        """There is no run record."""
        raise RuntimeError("InProcessGrid: there is no run record inside one process.")

    def create_message(self, *args: object, **kwargs: object) -> Message:
        """Not needed by message-based apps."""
        del args, kwargs
        raise RuntimeError("InProcessGrid: build messages with flwr.app.Message.")

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; they are always connected."""
        return list(self.order)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer messages, in the grid's order; an exception at a site becomes an error reply, as Flower makes it."""
        messages = list(messages)
        for message in messages:
            self.num_messages += 1
            message.metadata.__dict__["_message_id"] = f"message {self.num_messages}"  # as Flower's own grids do
        by_node = {message.metadata.dst_node_id: message for message in messages}
        for node in self.order:
            if node not in by_node:
                continue
            message = by_node[node]
            try:
                reply: Message | None = self.client(message, self.contexts[node])
            except Exception as error:
                reply = Message(Error(code=0, reason=f"{type(error)}{error}"), reply_to=message)
            if self.tamper is not None and reply is not None:
                reply = self.tamper(reply, message.metadata.message_type)
            if reply is not None:
                self.replies.append(reply)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to these messages that were not taken yet."""
        wanted = set(message_ids)
        taken = [reply for reply in self.replies if reply.metadata.reply_to_message_id in wanted]
        self.replies = [reply for reply in self.replies if reply.metadata.reply_to_message_id not in wanted]
        return taken

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The answers to these messages."""
        del timeout
        return self.pull_messages(self.push_messages(messages))


def run_in_process(
    server: ServerApp,
    client: ClientApp,
    overrides: str,
    node_configs: Mapping[int, Mapping[str, str | int | bool | float]],
    **grid_options: object,
) -> None:
    """Run a ServerApp over sites in this process; exceptions of the server reach the caller."""
    run_config = {"overrides": overrides}
    grid = InProcessGrid(client, node_configs, run_config, **grid_options)  # type: ignore[arg-type]
    server(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config)))
