"""What is declared: every drill and its outcome. docs/drills.md has them with what was measured."""

from experiments.drill.event import Drill, Event
from experiments.drill.spoiled import MANY
from server.rounds import ATTEMPTS

KEEPING = ("strategy=fedsa", "downlink=int8")  # B stays at the client, on its disk; and it is sent changes of a model that it holds

DRILLS = (
    Drill("raises", "A client's training raises", Event("raises"), "out of memory"),
    Drill("killed", "A client is killed in mid-fit; it is back in the next round, with its disk", Event("killed"), "Node Unavailable"),
    Drill("gone", "A client is killed in mid-fit and never comes back", Event("gone", (1, 2, 3)), "Node Unavailable"),
    Drill("silent", "A client's reply never comes", Event("silent"), "no answer within 2 s", overrides=("deadline=2",)),
    Drill("late", "A client's reply comes after the deadline, in the next round", Event("late"), "no answer within 2 s",
          overrides=("deadline=2",)),
    Drill("restarted", "A client is killed between rounds: its disk is kept, the model it held is lost", Event("restarted"), resent=True,
          overrides=KEEPING),
    Drill("twice", "A reply comes twice", Event("twice")),
    Drill("stale", "A client answers with its update of the round before", Event("stale"), "its reply is of round 0"),
    Drill("truncated", "Half of an update's bytes are missing", Event("truncated"), "payload holds"),
    Drill("nan", "An update holds a NaN", Event("nan"), "not finite"),
    Drill("rank", "An update has a rank more than it was sent", Event("rank"), "sent was"),
    Drill("oversized", f"An update is {MANY >> 20} MB too long", Event("oversized"), "payload holds"),
    Drill("disk", "A client's disk is full", Event("disk"), "could not be written"),
    Drill("few", "Three of four clients raise, min_clients=2; not in the second attempt", Event("raises", clients=(1, 2, 3)),
          "out of memory", count=True),
    Drill("too few", "Three of four clients raise in every attempt, min_clients=2", Event("raises", clients=(1, 2, 3), times=ATTEMPTS),
          count=True, stopped="1 clients answered, min_clients=2 are needed"),
    Drill("server", "The server is killed with -9 in mid-round", Event("server"), count=True, stopped="killed by signal 9"),
    Drill("server+state", "The same where clients keep half of the adapter", Event("server"), count=True, stopped="killed by signal 9",
          resent=True, overrides=KEEPING),
)  # fmt: skip

LEFT = ("deadline=40",)  # a round takes 5 s, on a busy machine 20
QUICK = "server"  # played by every test run, in which tests/e2e/test_deployment.py kills a worker, too
DEPLOYED = (
    Drill("worker", "A client's worker is killed in mid-fit and started again", Event("worker")),
    Drill("server", "The run's ServerApp is killed with -9 in mid-round", Event("server"), stopped="killed by signal 9"),
    Drill("server+state", "The same where clients keep half of the adapter", Event("server"), stopped="killed by signal 9", resent=True,
          overrides=KEEPING),
    Drill("host", "All of the server's processes are killed in mid-round; `server up`, `--resume`", Event("host"),
          stopped="killed by signal 9"),
    Drill("superlink", "The SuperLink is killed in mid-round and started again", Event("superlink")),
    Drill("supernode", "A SuperNode is killed in mid-fit and started again; its worker lives", Event("supernode"), "Node Unavailable"),
    Drill("killed", "A client (SuperNode, ClientApp, worker) is killed in mid-fit and started again", Event("killed"), "Node Unavailable"),
    Drill("gone", "A client is killed in mid-fit and never comes back", Event("gone", (1, 2, 3)), "Node Unavailable",
          overrides=("deadline=120",)),
    Drill("late", "A client's reply comes after the deadline, in the next round", Event("late"), "no answer within 40 s", overrides=LEFT),
    # Its own seed: a SuperLink that still holds the very bytes of an update, as after `late`, takes them as sent.
    Drill("slow", "A client's line is so slow that its reply, begun in time, is not whole at the deadline", Event("slow"),
          "no answer within 40 s", overrides=(*LEFT, "seed=1")),
    Drill("twice", "A SuperNode sends every reply twice", Event("twice")),
    Drill("lost", "A worker's answer is lost on its way to the ClientApp, which asks again", Event("lost")),
    Drill("raises", "A client's training raises", Event("raises"), "out of memory"),
    Drill("stale", "A client answers with its update of the round before", Event("stale"), "its reply is of round 0"),
    Drill("truncated", "Half of an update's bytes are missing", Event("truncated"), "payload holds"),
    Drill("nan", "An update holds a NaN", Event("nan"), "not finite"),
    Drill("rank", "An update has a rank more than it was sent", Event("rank"), "sent was"),
    Drill("oversized", f"An update is {MANY >> 20} MB too long", Event("oversized"), "payload holds"),
    Drill("disk", "A client's disk is full", Event("disk"), "the reason stands in the client's log"),
    Drill("few", "Three of four clients raise, min_clients=2; not in the second attempt", Event("raises", clients=(1, 2, 3)),
          "out of memory", count=True),
    Drill("too few", "Three of four clients raise in every attempt, min_clients=2", Event("raises", clients=(1, 2, 3), times=ATTEMPTS),
          count=True, stopped="1 clients answered, min_clients=2 are needed"),
)  # fmt: skip
