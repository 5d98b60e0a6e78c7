"""Load orders in the order of use: which wait, and which hold a slot.

Pure bookkeeping for the ``Conveyor``: no slots, no loads, no clock. A booking is one expert for one call to come. It
waits until its turn comes, then holds its expert in a slot until that call has come, or it is void. Calls are places
(position, layer) in their sequence, and come in that order; position is that of the first token that the pass reads.

A pass that reads several positions is foretold position by position, but computed layer by layer. So turns go by
places, not by arrival: what is ordered late for an early place goes before all later places of its sequence. Between
sequences they go by arrival.
"""

import bisect
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from raymoe.experts.call import LoadOrder
from raymoe.types import StepId

MOST_BOOKINGS = 4096  # a shadow a few steps ahead orders some hundreds of one worker
MOST_SEQUENCES = 1024  # that are remembered, ended ones too, so that their last orders find nobody
# Calls of others after which a sequence of which nothing is heard has ended without a word. With 40 sequences in turns
# and 24 layers on a worker, one that lives is heard of every 960 calls.
STALE_CALLS = 1024

Place = tuple[int, int]
Turn = tuple[int, Place, int]


@dataclass(slots=True, eq=False)
class Booking:
    """One expert for one call to come.

    Attributes:
        number: counts bookings in the order in which they came.
        rank: the number, or that of a booking for a later place of its sequence, if that is lower.
    """

    identifier: int
    sequence: int
    place: Place
    epoch: int
    number: int
    rank: int

    @property
    def turn(self) -> Turn:
        """Its place among all bookings. Within a sequence turns follow places."""
        return self.rank, self.place, self.number


@dataclass(slots=True)
class Course:
    """What is known of one sequence.

    Attributes:
        heard: calls of all sequences before it was last heard of.
        epoch: the highest one that ordered.
        place: of its last call.
        bookings: all of it, by place.
        unordered: by expert, how many calls at ``place`` asked for it before an order did. Such orders are late.
        ended: it was forgotten; its orders are void until it calls again.
    """

    heard: int
    epoch: int = 0
    place: Place | None = None
    bookings: list[Booking] = field(default_factory=list)
    unordered: dict[int, int] = field(default_factory=dict)
    ended: bool = False


class Timetable:
    """Bookings of all sequences.

    Attributes:
        late: bookings that never held a slot: their call came first, or they became void.
        refused: bookings that were too many.
    """

    def __init__(self) -> None:
        self.late = 0
        self.refused = 0
        self._waiting: list[Booking] = []  # by turn
        self._holding: dict[int, list[Booking]] = {}  # by expert
        self._courses: OrderedDict[int, Course] = OrderedDict()  # the one last heard of is last
        self._calls = 0
        self._number = 0

    def __len__(self) -> int:
        return len(self._waiting) + sum(map(len, self._holding.values()))

    # --- what comes from outside ------------------------------------------------------------------------

    def order(self, order: LoadOrder, identifiers: list[int]) -> None:
        """Book what an order names. Void is what earlier epochs booked for its step and later ones.

        Args:
            identifiers: the order's experts, each once.
        """
        sequence, position = order.step.sequence, order.step.position
        course = self._hear(sequence)
        if course.ended or order.epoch < course.epoch:
            self.late += len(identifiers)
            return
        if order.epoch > course.epoch:
            course.epoch = order.epoch
            self._end(course, [b for b in course.bookings if b.epoch < order.epoch and b.place[0] >= position])
        place = (position, order.layer)
        if course.place is not None and place < course.place:
            self.late += len(identifiers)
            return
        room = MOST_BOOKINGS - len(self)
        for identifier in identifiers:
            if place == course.place and course.unordered.get(identifier):
                course.unordered[identifier] -= 1
                self.late += 1
            elif place == course.place and position:  # a decode step's layer comes in one call, and it has come
                self.late += 1
            elif room <= 0:
                self.refused += 1
            else:
                self._book(course, identifier, order, place)
                room -= 1

    def call(self, step: StepId | None, layer: int, identifiers: list[int]) -> None:
        """A call has come. Each of its experts uses up one booking for it; those for earlier calls are void.

        So are others for the same step and layer, but in a prompt (at position 0), whose layers come in several calls.
        """
        self._calls += 1
        self._expire()
        if step is None:
            return
        course = self._hear(step.sequence)
        if course.ended:
            course = self._courses[step.sequence] = Course(self._calls)
        place = (step.position, layer)
        if place != course.place:
            course.place = place
            course.unordered.clear()
        first = bisect.bisect_left(course.bookings, place, key=_place)
        void, unmet = course.bookings[:first], set(identifiers)
        for booking in course.bookings[first : bisect.bisect_right(course.bookings, place, key=_place)]:
            if booking.identifier in unmet:
                unmet.remove(booking.identifier)
                void.append(booking)
            elif step.position:
                void.append(booking)
        self._end(course, void)
        for identifier in unmet:
            course.unordered[identifier] = course.unordered.get(identifier, 0) + 1

    def forget(self, sequence: int) -> None:
        """A sequence has ended: what it booked is void, and what it still orders."""
        course = self._hear(sequence)
        self._end(course, course.bookings)
        self._courses[sequence] = Course(course.heard, ended=True)

    # --- turns ------------------------------------------------------------------------------------------

    def next(self) -> int | None:
        """The expert whose turn it is, of those that wait."""
        return self._waiting[0].identifier if self._waiting else None

    def next_step(self) -> StepId | None:
        """The forward that will use it."""
        if not self._waiting:
            return None
        return StepId(sequence=self._waiting[0].sequence, position=self._waiting[0].place[0])

    def hold(self) -> None:
        """The booking whose turn it is holds its expert's slot from now on."""
        booking = self._waiting.pop(0)
        self._holding.setdefault(booking.identifier, []).append(booking)

    def holds(self, identifier: int) -> bool:
        """Whether a booking holds the expert's slot."""
        return identifier in self._holding

    def due(self, identifier: int) -> Turn:
        """When the expert in a slot that is held will be used: the turn of its first booking."""
        return min(booking.turn for booking in self._holding[identifier])

    def next_uses(self) -> dict[int, Turn]:
        """When each ordered expert will be used next: the turn of its first booking, in a slot or not."""
        uses = {identifier: self.due(identifier) for identifier in self._holding}
        for booking in self._waiting:
            uses[booking.identifier] = min(booking.turn, uses.get(booking.identifier, booking.turn))
        return uses

    def is_wrong(self, identifier: int, step: StepId | None, layer: int) -> bool:
        """Whether the expert's slot is held for nothing but the call that has come now, which does not ask for it."""
        if step is None:
            return False
        mine = (step.sequence, (step.position, layer))
        return all((booking.sequence, booking.place) == mine for booking in self._holding[identifier])

    def put_back(self, identifier: int) -> None:
        """The expert loses its slot: its bookings wait again, in their places."""
        for booking in self._holding.pop(identifier):
            bisect.insort(self._waiting, booking, key=_turn)

    def drop(self, identifier: int) -> None:
        """The expert loses its slot, and its bookings are void."""
        for booking in list(self._holding.get(identifier, ())):
            self._end(self._courses[booking.sequence], [booking])

    def cancel(self, identifier: int) -> None:
        """The expert can't be had any more: all its bookings are void, those that wait too."""
        for course in self._courses.values():
            self._end(course, [booking for booking in course.bookings if booking.identifier == identifier])

    # --- inside -----------------------------------------------------------------------------------------

    def _book(self, course: Course, identifier: int, order: LoadOrder, place: Place) -> None:
        """One booking more of a course. Where its place has one for the expert already, that one stands for both.

        But in a prompt (at position 0): its layers come in several calls, each of which has bookings of its own.
        """
        first = bisect.bisect_left(course.bookings, place, key=_place)
        after = bisect.bisect_right(course.bookings, place, lo=first, key=_place)
        if place[0] and any(booking.identifier == identifier for booking in course.bookings[first:after]):
            return
        self._number += 1
        rank = min([self._number, *(booking.rank for booking in course.bookings[after : after + 1])])
        booking = Booking(identifier, order.step.sequence, place, order.epoch, self._number, rank)
        bisect.insort(self._waiting, booking, key=_turn)
        course.bookings.insert(after, booking)

    def _hear(self, sequence: int) -> Course:
        """The course of a sequence that shows that it lives."""
        course = self._courses.get(sequence)
        if course is None:
            course = self._courses[sequence] = Course(self._calls)
            self._expire()
        course.heard = self._calls
        self._courses.move_to_end(sequence)
        return course

    def _expire(self) -> None:
        while self._courses:
            sequence, course = next(iter(self._courses.items()))
            if len(self._courses) <= MOST_SEQUENCES and self._calls - course.heard <= STALE_CALLS:
                return
            self._end(course, course.bookings)
            del self._courses[sequence]

    def _end(self, course: Course, bookings: Iterable[Booking]) -> None:
        """These bookings of a course were used, or are void."""
        gone = {booking.number for booking in bookings}
        if not gone:
            return
        for booking in (booking for booking in course.bookings if booking.number in gone):
            at = bisect.bisect_left(self._waiting, booking.turn, key=_turn)
            if at < len(self._waiting) and self._waiting[at] is booking:
                del self._waiting[at]
                self.late += 1
                continue
            holding = self._holding[booking.identifier]
            holding.remove(booking)
            if not holding:
                del self._holding[booking.identifier]
        course.bookings = [booking for booking in course.bookings if booking.number not in gone]


def _place(booking: Booking) -> Place:
    return booking.place


def _turn(booking: Booking) -> Turn:
    return booking.turn
