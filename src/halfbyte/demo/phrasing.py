"""The words of the demo's task: how colleagues ask, in training and, otherwise, in the held-out rows.

The two tables share no phrase, name or item (`tests/demo/test_task.py` holds that), so that the score says whether
the model has learnt to read, not what it remembers. Verbs agree with "a kettle" as well as with "four kettles".
"""

from dataclasses import dataclass


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


@dataclass(frozen=True)
class Phrasing:
    """One side's surface forms. `{what}` is the quantity with the item, `{due}` a day, `{name}` the writer.

    `due` reads on after any body. `urgent` and `calm` are remarks: `calm` ones say that there is no hurry, or nothing.
    """

    bodies: dict[str, tuple[str, ...]]
    due: tuple[str, ...]
    urgent: tuple[str, ...]
    calm: tuple[str, ...]
    opening: tuple[str, ...]
    closing: tuple[str, ...]
    greeting: tuple[str, ...]
    names: tuple[str, ...]
    items: tuple[str, ...]
    even_dates: bool


TRAIN = Phrasing(
    bodies={
        "order": (
            "please order {what}",
            "we need {what}",
            "could you get us {what}",
            "I would like to order {what}",
            "can I have {what}",
            "kindly send {what} to our office",
            "please put in an order for {what}",
            "our team is asking for {what}",
            "can you buy {what} for the office",
            "I am missing {what}, please order",
            "we would like {what}",
            "is it possible to order {what}",
        ),
        "return": (
            "I want to return {what}",
            "please take back {what}",
            "we are sending back {what}",
            "I have to give back {what}",
            "{what} must go back to the shop",
            "can we return {what}",
            "we do not like {what}, please take the delivery back",
            "please collect {what} for return",
            "how can I return {what}",
            "we received {what} by mistake and want to return it all",
            "I am returning {what}",
            "please arrange the return of {what}",
        ),
        "repair": (
            "please repair {what}",
            "{what} stopped working",
            "something is wrong with {what}",
            "can someone fix {what}",
            "{what} broke down",
            "we have {what} that must be repaired",
            "I need someone to repair {what}",
            "please send somebody to fix {what}",
            "{what} made a strange noise and broke",
            "there is a fault in {what}",
            "{what} fell down and got damaged, please repair",
            "nobody can use {what} any more, please fix",
        ),
        "cancel": (
            "please cancel {what}",
            "cancel my order of {what}",
            "I want to cancel the order for {what}",
            "please stop the order for {what}",
            "we no longer need the order of {what}",
            "do not send {what}, I cancel",
            "the order of {what} was a mistake, please cancel",
            "can you cancel {what} for us",
            "please remove {what} from my order",
            "I have to cancel the delivery of {what}",
            "do not deliver {what}, the order is cancelled",
            "we ordered {what} twice, please cancel",
        ),
    },
    due=(
        "by {due}",
        "before {due}",
        "not later than {due}",
        "if possible by {due}",
        "and we need it done by {due}",
        "so that it is done before {due}",
        "with a deadline of {due}",
        "and finish by {due}",
        "by {due} if you can",
        "by {due} or earlier",
        "and everything must be ready on {due} or sooner",
        "before {due} if that works for you",
        "by {due}, not a day later",
    ),
    urgent=(
        "It is urgent.",
        "Please hurry.",
        "As soon as possible, please.",
        "This is very urgent!",
        "We cannot wait.",
        "Top priority.",
        "This is an emergency.",
        "Please be quick.",
        "It is really important to have it soon.",
        "Urgent!",
        "We need it fast.",
        "This cannot wait.",
        "Please treat it as urgent.",
        "I need it right now.",
        "Everybody is waiting for it.",
        "Do it at once, please.",
        "The matter is pressing.",
        "This has the highest priority.",
        "Quick, please!",
        "We are in a great hurry.",
        "It has to happen immediately.",
        "Hurry up, please.",
        "Please do it right away.",
        "ASAP please.",
        "Please give it priority.",
        "We really need it soon.",
        "Time is short.",
        "This is critical.",
        "Please do not let us wait.",
        "We are losing time.",
        "Please make haste.",
        "Sooner is better, it is urgent.",
    ),
    calm=(
        "There is no hurry.",
        "It is not urgent.",
        "Take your time.",
        "We can wait.",
        "Low priority.",
        "No need to rush.",
        "Whenever you have time.",
        "It is not so important.",
        "There is plenty of time.",
        "Nothing urgent.",
        "We are not in a hurry.",
        "This can wait for a while.",
        "Any time is fine.",
        "I do not need it right now.",
        "Nobody is waiting for it.",
        "Some time later is fine.",
        "The matter is not pressing.",
        "This has the lowest priority.",
        "No hurry, please.",
        "It does not have to be soon.",
        "We are on the second floor.",
        "The door is open.",
        "Please call me first.",
        "Just leave it at the desk.",
        "Send the bill to my office.",
        "My phone number has not changed.",
        "You know where to find us.",
        "It is for the meeting room.",
        "The colour does not matter.",
        "Let me know if you have questions.",
        "The other team is happy too.",
        "We talked about it last time.",
    ),
    opening=(
        "This is {name}.",
        "{name} here.",
        "I am {name}.",
        "It is {name} from sales.",
        "Hello from {name}.",
        "You are talking to {name}.",
        "{name} is writing to you.",
        "I am called {name}.",
    ),
    closing=("Thanks, {name}", "Regards, {name}", "- {name}", "Best, {name}", "Thank you! {name}"),
    greeting=("Hi,", "Hello,", "Good morning,", "Dear team,", "Hey,"),
    names=_list(
        "Maria, Omar, Chen, Anna, Pavel, Ines, Kofi, Laura, Dmitri, Aisha, Tom, Yuki, Carlos, Nina, Ravi, Emma, "
        "Jonas, Fatima, Luca, Sara, Peter, Mei, Diego, Olga, Hassan, Julia, Marco, Priya, Ivan, Lena, Ahmed, "
        "Clara, Hugo, Zoe, Kenji, Eva, Samuel, Rita, Viktor, Amina, Paul, Sofia, Bruno, Helen, Tariq, Nora, "
        "Felix, Grace, Andrei, Leila, Simon, Vera, Siobhan, Thandiwe, Giacomo, Anneliese, Bogdan, Xiomara, "
        "Oluwaseun, Ludmila, Torvald, Zuzanna, Mireille, Nikhil, Radomir, Ghislaine, Takumi, Yevgenia, Kwabena, "
        "Fredrika, Iolanda, Bjarne, Chidi, Svetlana, Jorunn, Eszter, Gwendolyn, Rukmini, Sandor, Tomasz, "
        "Wilhelmina, Jacinto"
    ),
    items=_list(
        "chair, desk lamp, monitor, printer, keyboard, projector, headset, laptop, webcam, phone, router, "
        "scanner, heater, fan, whiteboard, coffee machine, microphone, speaker, cable, charger, tablet, camera, "
        "table, sofa, mirror, office chair, battery pack, power strip, door lock, paper tray, screen, drill, "
        "ladder, window blind, light bulb, hard drive, calculator, radio, ticket printer, coat rack, thermostat, "
        "dehumidifier, doorbell, lampshade, corkboard, bookend, wheelbarrow, hand dryer, flipchart, loudspeaker, "
        "turnstile, teapot, tripod, lightbox, smoke detector, pencil sharpener, ergonomic mousepad, soldering iron, "
        "laminator, doormat, umbrella stand, parasol, pinboard, pedestal, rucksack, saucepan, typewriter, "
        "wristband, bottle opener, hairdryer"
    ),
    even_dates=True,
)

HELD_OUT = Phrasing(
    bodies={
        "order": (
            "would you order {what} for me",
            "we are in need of {what}",
            "I'd like to have {what}",
            "please bring us {what}",
            "my department requires {what}",
            "we want to buy {what}",
        ),
        "return": (
            "we would like to return {what}",
            "I'd like to send back {what}",
            "please pick up {what}, we are giving the whole lot back",
            "I am bringing back {what}",
            "{what} should be taken back",
            "we have decided to return {what}",
        ),
        "repair": (
            "we would like to have {what} repaired",
            "would you fix {what} for us",
            "we noticed a problem with {what}",
            "could a technician repair {what}",
            "I broke {what}, can you fix the damage",
            "{what} failed and should be fixed",
        ),
        "cancel": (
            "I'd like to cancel {what}",
            "our order for {what} should be cancelled",
            "could you cancel the purchase of {what}",
            "we changed our mind about {what}, so please cancel",
            "forget about {what}, cancel everything",
            "kindly cancel the request for {what}",
        ),
    },
    due=(
        "no later than {due}",
        "by {due} at the latest",
        "ideally by {due}",
        "to be ready by {due}",
        "any time before {due}",
        "by {due} if at all possible",
    ),
    urgent=(
        "We need this urgently.",
        "Please do it quickly!",
        "High priority.",
        "Please act fast.",
        "I am in a hurry.",
        "Very urgent, please.",
    ),
    calm=(
        "No rush at all.",
        "It can wait.",
        "Not urgent.",
        "Please take all the time you need.",
        "We are in the building next door.",
        "Please put it into the kitchen.",
        "The receipt is in my desk.",
        "Please tell me when it is done.",
    ),
    opening=(
        "My name is {name}.",
        "{name} speaking.",
        "Here is {name}.",
        "{name} from the third floor here.",
    ),
    closing=("Many thanks, {name}", "Kind regards, {name}", "Cheers, {name}"),
    greeting=("Good afternoon,", "Hello there,", "Good day,"),
    names=_list(
        "Elena, Mateo, Ingrid, Karim, Alice, Boris, Chiara, Daniel, Esther, Farid, Georg, Hana, Isabel, Jakob, "
        "Katya, Leon, Mona, Nils, Oscar, Petra, Quentin, Rosa, Stefan, Tanja, Umar, Kasimir, Ottilie, Babajide, "
        "Marisol, Henrik"
    ),
    items=_list(
        "kettle, step stool, docking station, shredder, label maker, air purifier, fridge, toaster, water cooler, "
        "trolley, stapler, vacuum cleaner, clock, footrest, cabinet, locker, television, freezer, suitcase, "
        "helmet, guitar, bicycle, badge reader, blender, telescope, wire cutter, humidity sensor"
    ),
    even_dates=False,
)
