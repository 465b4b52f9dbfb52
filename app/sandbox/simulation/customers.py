"""Customers who join, change their profile and leave: the table users."""

from __future__ import annotations

from random import Random

from app.sandbox.people import (
    DAY,
    SandboxPerson,
    change_time,
    changed_field,
    changes_until,
    spelled_phone,
)
from app.sandbox.simulation.messages import Messages
from app.sandbox.simulation.progress import sql_time
from app.sandbox.simulation.state import Simulation
from app.sandbox.sink import Value

UPDATE_USER = (
    "UPDATE users SET email=%s, email_verified=%s, phone_number=%s, phone_verified=%s, name=%s, address=%s, city=%s, "
    "country=%s, loyalty_id=%s, created_at=%s, updated_at=%s WHERE user_id=%s"
)


class CustomerSimulation:
    """Writes a person's accounts: a web account, sometimes a second one, and a loyalty card."""

    def __init__(self, simulation: Simulation, messages: Messages) -> None:
        self.simulation, self.messages = simulation, messages

    def join(self, _time: int, number: int) -> None:
        """Create the accounts of a person and schedule the changes to come."""
        simulation = self.simulation
        person = simulation.person(number)
        written_at = max(person.joined, simulation.now.live_from)
        if person.leaves is not None and person.leaves <= written_at:
            return
        for user_id in (person.web, person.card):
            if user_id is not None:
                self._write_user(person, user_id, written_at)
        if person.second is not None:
            simulation.at(self._second_joined(person), "second", person.number)
        if person.leaves is not None:
            simulation.at(person.leaves, "leave", person.number)
        if person.first_change is not None:
            count = changes_until(person, written_at) + 1
            simulation.at(change_time(person, count) or 0, "change", person.number, count)

    def open_second_account(self, time: int, number: int) -> None:
        """Create the second web account of a person."""
        person = self.simulation.person(number)
        written_at = max(time, self.simulation.now.live_from)
        if person.second is not None and (person.leaves is None or person.leaves > written_at):
            self._write_user(person, person.second, written_at)

    def change_profile(self, time: int, number: int, count: int) -> None:
        """Make the change of a profile with this count, and schedule the next one."""
        simulation, person = self.simulation, self.simulation.person(number)
        if person.leaves is not None and person.leaves <= time:
            return
        next_time = change_time(person, count + 1)
        if next_time is not None:
            simulation.at(next_time, "change", number, count + 1)
        if person.web is not None:
            metadata = f'{{"field":"{changed_field(simulation.seed, person, count)}"}}'
            visitor = (person.web, simulation.next_session(), person.devices[0], person.ip, "web")
            self.messages.behaviour_event(time + 1000, "account_changed", visitor, metadata)
        if time <= simulation.now.live_from:
            return
        for user_id in self.user_ids(person, time):
            simulation.sink.change(UPDATE_USER, *self._user_values(person, user_id, time), user_id)

    def leave(self, time: int, number: int) -> None:
        """Delete the accounts of a person."""
        if time > self.simulation.now.live_from:
            for user_id in self.user_ids(self.simulation.person(number), time):
                self.simulation.sink.change("DELETE FROM users WHERE user_id=%s", user_id)

    def user_ids(self, person: SandboxPerson, time: int) -> list[int]:
        """Return the accounts that a person has at a time."""
        ids = [user_id for user_id in (person.web, person.card) if user_id is not None]
        if person.second is not None and self._second_joined(person) < time:
            ids.append(person.second)
        return ids

    def consent_values(self, user_id: int) -> tuple[Value, ...]:
        """Return the value of the column that the first step adds to `users`, or () before it."""
        return ("t" if user_id % 3 == 0 else "f",) if self.simulation.now.added_columns.get("users") else ()

    def _second_joined(self, person: SandboxPerson) -> int:
        return max(person.joined + 30 * DAY, self.simulation.now.first_day * DAY)

    def _write_user(self, person: SandboxPerson, user_id: int, time: int) -> None:
        values = self._user_values(person, user_id, time)
        self.simulation.sink.row("users", user_id, *values, *self.consent_values(user_id))
        self.simulation.sink.add_truth("people", person.key, f"user:{user_id}")

    def _user_values(self, person: SandboxPerson, user_id: int, time: int) -> tuple[Value, ...]:
        """Return the columns of a `users` row after `user_id`, as of a time."""
        profile = self.simulation.profile(person, time)
        spelling = Random(f"{self.simulation.seed}/user/{user_id}/{profile.phone}")
        phone = profile.phone if spelling.random() < 0.6 else spelled_phone(spelling, profile.phone, person.country)
        count = changes_until(person, time)
        updated = max(person.joined, change_time(person, count) or 0) if count else person.joined
        place = (profile.street, profile.city, person.country.code)
        linked = person.card is not None and person.number % 10 < 7
        times = (sql_time(person.joined), sql_time(updated))
        if user_id == person.web:
            given = (profile.phone if person.phone_verified else phone) if person.phone_given else None
            contact = (profile.email, "t" if person.email_verified else "f", given, "t" if person.phone_verified else "f")
            return (*contact, person.name, *place, person.loyalty_id if linked else None, *times)
        if user_id == person.second:
            created = self._second_joined(person)
            name = f"{person.first[0]}. {person.last}" if person.number % 2 else person.name
            contact = (person.other_email, "t", phone, "t" if person.phone_verified else "f")
            return (*contact, name, *place, None, sql_time(created), sql_time(max(created, updated)))
        by_phone = person.own_phone and (person.web is None or linked or person.phone_given)
        show_email = person.card_shows in (1, 2) or not by_phone
        shown = (profile.email if show_email else None, "f", phone if by_phone and person.card_shows != 2 else None, "f")
        name = person.name.upper() if person.number % 3 == 0 else person.name
        return (*shown, name, *place, person.loyalty_id, *times)
