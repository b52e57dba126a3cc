"""How tests of the scheduler speak to it: one event, one step."""

from hpcq.scheduler import Assign, Ended, EndedTask, Finish, PilotReady, Started, Submitted


def submit(scheduler, *tasks, now=0.0):
    return scheduler.handle([Submitted(list(tasks))], now)


def ready(scheduler, pilot="p", cores=1, memory=1000, *, now=0.0, **options):
    return scheduler.handle([PilotReady(pilot, cores, memory, **options)], now)


def start(scheduler, *numbers, pilot="p", now=0.0):
    return scheduler.handle([Started(pilot, list(numbers))], now)


def end(scheduler, *numbers, pilot="p", outcome="success", seconds=0.0, memory=0.0, disk=0.0, now=0.0):
    ended = [EndedTask(number, outcome, seconds, memory, disk) for number in numbers]
    return scheduler.handle([Ended(pilot, ended)], now)


def assigned(commands):
    return {command.pilot: command.tasks for command in commands if isinstance(command, Assign)}


def allotted(commands):
    found = {}
    for command in commands:
        if isinstance(command, Assign):
            found.update({number: given.memory for number, given in command.allotted.items()})
    return found


def finished(commands):
    return {command.task: command.outcome for command in commands if isinstance(command, Finish)}
