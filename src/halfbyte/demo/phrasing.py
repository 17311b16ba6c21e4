"""The words of the demo's task: how colleagues ask, in training and, otherwise, in the held-out rows.

The two tables share no phrase, name or item (`tests/demo/test_task.py` holds that), so that the score says whether
the model has learnt to read, not what it remembers. Verbs agree with "a kettle" as well as with "four kettles".
"""

import random
from dataclasses import dataclass


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


def _made_up_names(count: int) -> tuple[str, ...]:
    """Names that nobody has: a model that has seen a few hundred different ones copies, where it would else guess."""
    rng = random.Random("names")
    starts, middles, ends = (
        _list("Al, An, Be, Ca, Da, El, Fa, Ga, He, Is, Jo, Ka, Li, Ma, No, Or, Pe, Ra, Sa, Ta, Ul, Va, Wi, Za"),
        _list("bi, da, fre, go, li, lo, mi, na, ne, ri, ro, sa, se, ti, va, ve"),
        _list("a, as, e, el, en, i, ia, in, is, o, on, us"),
    )
    names: dict[str, None] = {}
    while len(names) < count:
        names[rng.choice(starts) + rng.choice(middles) + rng.choice(ends)] = None
    return tuple(names)


@dataclass(frozen=True)
class Phrasing:
    """One side's surface forms. `{what}` is the quantity with the item, `{due}` a day, `{name}` the writer.

    `due` reads on after any body. The remarks say that the matter is `urgent`, that there is no hurry (`calm`), or
    something else (`neutral`).
    """

    bodies: dict[str, tuple[str, ...]]
    due: tuple[str, ...]
    urgent: tuple[str, ...]
    calm: tuple[str, ...]
    neutral: tuple[str, ...]
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
            "deliver {what} to us, please",
            "get me {what}, please",
            "I want {what}",
            "could we get {what}",
            "{what} for our office, please",
            "my colleague wants to order {what}",
            "please add {what} to our order",
            "can you provide {what}",
            "please purchase {what}",
            "my department would like to have {what}",
            "we require {what}",
            "please bring {what} to my room",
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
            "I would like to give {what} back",
            "take {what} back, please",
            "{what} can go back to you",
            "please refund {what}, I am sending it all back",
            "I do not want to keep {what}",
            "we are done with {what} and want to return it all",
            "you will get back {what} from us",
            "we must return {what}",
            "please accept our return of {what}",
            "I decided to give back {what}",
            "we brought {what} back",
            "please let us return {what}",
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
            "{what} must be fixed",
            "please look at {what}, something broke",
            "{what} refused to start",
            "could you mend {what}",
            "there was smoke coming out of {what}",
            "{what} got broken",
            "I need help with {what} that broke",
            "is it possible to repair {what}",
            "{what} failed and must be repaired",
            "we found a defect in {what}",
            "please send a technician for {what}",
            "{what} should be repaired by a technician",
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
            "I do not want {what} any more, please cancel",
            "please call off the order of {what}",
            "cancel {what}, please",
            "stop the delivery of {what}",
            "{what} can be cancelled",
            "my order of {what} is no longer needed",
            "I would like to cancel {what}",
            "is it possible to cancel {what}",
            "drop {what} from our order",
            "scrap the order of {what}",
            "please do not process my order of {what}",
            "you may forget my order of {what}",
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
        "Nothing pressing.",
        "Not important.",
        "It may wait.",
        "That can wait until you have time.",
        "You can take as long as you like.",
        "Hurrying is not necessary.",
        "Urgent it is not.",
        "This is not an emergency.",
        "It does not matter when.",
        "A later day is fine too.",
        "There is no need to be quick.",
        "We will not need it soon.",
        "I can wait.",
        "Do not hurry.",
        "Please do not rush.",
        "It is of low urgency.",
        "This has no priority.",
        "Not so urgent at all.",
    ),
    neutral=(
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
        "Please ring the bell.",
        "Please knock first.",
        "Please write me an email about it.",
        "Please use the back door.",
        "Please ask for me at the front.",
        "Please keep the receipt.",
        "Please mind the steps.",
        "Please be careful with the carpet.",
        "Please say hello to the team.",
        "Please tell my boss too.",
        "We have moved to the fourth floor.",
        "My email is on the form.",
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
        "Wilhelmina, Jacinto, Abimbola, Agnieszka, Alejandro, Anselm, Beatriz, Berenike, Casimira, Catalina, "
        "Cosmin, Dariusz, Delphine, Dunja, Edwina, Efrain, Eleftheria, Emeka, Fiorella, Florin, Genoveva, "
        "Gunther, Halima, Hortense, Ibrahim, Ignacio, Ilse, Jaroslav, Jamila, Kasimira, Keziah, Klemens, Larissa, "
        "Leopold, Lisandro, Magdalena, Marcelo, Mbali, Miroslav, Nadezhda, Natsuki, Norbert, Octavia, Orhan, "
        "Pasquale, Philippa, Rodrigo, Roswitha, Rustam, Sigrid, Soledad, Stanislav, Tatsuya, Thorsten, Ursula, "
        "Valentina, Vasily, Wojciech, Yasmin, Yolanda, Zacharias, Zeynep, Matthew, Rachel, Andrew, Charlotte, "
        "Benjamin, Victoria, Nathan, Hannah, Oliver, Margaret"
    )
    + _made_up_names(150),
    items=_list(
        "chair, desk lamp, monitor, printer, keyboard, projector, headset, laptop, webcam, phone, router, "
        "scanner, heater, fan, whiteboard, coffee machine, microphone, speaker, cable, charger, tablet, camera, "
        "table, sofa, mirror, office chair, battery pack, power strip, door lock, paper tray, screen, drill, "
        "ladder, window blind, light bulb, hard drive, calculator, radio, ticket printer, coat rack, thermostat, "
        "dehumidifier, doorbell, lampshade, corkboard, bookend, wheelbarrow, hand dryer, flipchart, loudspeaker, "
        "turnstile, teapot, tripod, lantern, smoke detector, pencil sharpener, ergonomic mousepad, soldering "
        "iron, laminator, doormat, umbrella stand, parasol, pinboard, pedestal, rucksack, saucepan, typewriter, "
        "wristband, bottle opener, hairdryer, accordion, aquarium, barometer, bathtub, blackboard, bucket, "
        "candlestick, ceiling lamp, chandelier, clarinet, coaster, compressor, cupboard, dustbin, earphone, "
        "envelope opener, extinguisher, filing tray, flashlight, floor mat, flower pot, fountain pen, frying pan, "
        "grill, hammer, handcart, inkwell, jacket, jug, lectern, magnifier, megaphone, mixer, oscilloscope, "
        "padlock, pencil case, pillow, plotter, raincoat, saxophone, shovel, sleeping bag, spatula, spotlight, "
        "stopwatch timer, stretcher, teaspoon, thermometer, tumbler, ukulele, voltmeter, waffle iron, walking "
        "stick, watering can, wheelchair, xylophone, backpack, bagpipe, birdcage, bulldozer, candelabra, "
        "cauldron, chainsaw, chalkboard, cocktail shaker, corkscrew, dartboard, deckchair, dollhouse, dustpan, "
        "espresso maker, fishing rod, floodlight, footstool, gramophone, greenhouse, harmonica, headlamp, jigsaw, "
        "kaleidoscope, lawnchair, mandolin, mousetrap, nightstand, parachute, periscope, pressure cooker, "
        "projector mount, raft, roundtable, sandwich grill, seesaw, snowplough, sprinkler, surfboard, tambourine, "
        "toolbelt, trampoline, turntable, typewriter case, whistle, windmill, yardstick, zipline, apron, "
        "armchair, basket, beam, bell, bolt, bowl, bulb, canister, cap, clamp, cloak, coat, cork, cradle, "
        "cushion, dial, drawer, drum, duvet, fence, flag, flask, fork, funnel, gate, glove, hatch cover, hinge, "
        "hook, hose, kite, knife block, lamp, latch key, lid, lens cap, magnet, mat, mop, mug, net, pan, pedal, "
        "pipe, plank, plate, plug, pot, quilt, rack, rake, razor, robe, rope, saddle, sail, saw, scarf ring, "
        "scale, sink, sled, spade, spoon, stamp, stool, stove, tap, tile, tool, towel, tray, tub, tube, valve, "
        "vest, wagon, wheel, wig, wrench set"
    ),
    even_dates=True,
)

HELD_OUT = Phrasing(
    bodies={
        "order": (
            "could you please order {what}",
            "I'm writing to order {what}",
            "we'd love to get {what}",
            "please purchase {what} for us",
            "I'd need {what}",
            "may we order {what}",
        ),
        "return": (
            "may I return {what}",
            "I'm giving back {what}",
            "we have {what} to return",
            "please accept {what} back",
            "I've decided to return {what}",
            "{what} should be taken back",
        ),
        "repair": (
            "{what} just broke",
            "who can repair {what}",
            "please have {what} repaired",
            "we've got a defect in {what}",
            "can a technician fix {what}",
            "{what} suddenly failed, please repair",
        ),
        "cancel": (
            "please cancel our request for {what}",
            "we have to cancel {what}",
            "could you cancel the purchase of {what}",
            "I wish to cancel {what}",
            "I'm cancelling {what}",
            "our order for {what} should be cancelled",
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
        "We need this immediately!",
        "Please act right now.",
        "This is extremely urgent.",
        "High priority.",
        "I am in a hurry.",
        "Please be fast.",
    ),
    calm=(
        "There is no deadline.",
        "It can wait.",
        "Not urgent.",
        "You have lots of time.",
    ),
    neutral=(
        "Our office has a new address.",
        "The invoice goes to accounting.",
        "You can park in the yard.",
        "It is raining here.",
    ),
    opening=(
        "My name is {name}.",
        "{name} speaking.",
        "Here is {name}.",
        "{name} from the warehouse.",
    ),
    closing=(
        "Many thanks, {name}",
        "Kind regards, {name}",
        "Cheers, {name}",
        "Yours, {name}",
    ),
    greeting=(
        "Good afternoon,",
        "Hello there,",
        "Good day,",
    ),
    names=_list(
        "Adela, Basil, Caroline, Derek, Elise, Fabian, Greta, Harold, Irina, Jasper, Karolina, Lukas, Martina, "
        "Nelson, Ophelia, Patrick, Renata, Sebastian, Tamara, Ulrich, Vanessa, Walter, Xavier, Yvonne, Zoltan, "
        "Alina, Bernard, Celine"
    ),
    items=_list(
        "barrel, blanket, broom, canoe, crate, curtain, dresser, drone, easel, generator, trolley, hammock, toaster, "
        "lawn mower, motor, napkin holder, oven, wardrobe, safe, scooter, sewing kit, trumpet, violin, wire cutter, "
        "kettle, bicycle, guitar, telescope"
    ),
    even_dates=False,
)
