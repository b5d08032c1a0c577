"""The names that schemas are made of.

No word is shared between splits, nor between the kinds of one split: a question that names a column then points at one
table only, and a model cannot have met a test schema's names while training. Values are not listed: they are made up.
"""

# ruff: noqa: SIM905 - lists of words read better as text than as literals

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Words:
    """What one split may name: `tables`, columns that hold text, and columns that hold numbers."""

    tables: tuple[str, ...]
    texts: tuple[str, ...]
    numbers: tuple[str, ...]

    def all(self) -> frozenset[str]:
        """Every word of the split."""
        return frozenset((*self.tables, *self.texts, *self.numbers))


_TRAIN = Words(
    tables=tuple(
        """actor album animal arena artist auction bakery bank band barn battery beach bike boat bottle branch bridge
        bus cabin cafe camera camp canal carpet castle cave chapel chef church cinema circus clinic club coach comet
        concert cottage course court dancer desert diner doctor dragon driver engine estate exam factory fair farm ferry
        festival film flight flower forest fossil fridge gallery game garage garden glacier guitar harbor helmet horse
        hospital hotel island jacket jewel kennel kitchen lake lamp laptop lawyer library lodge machine market meal
        medal meeting mine mirror monster motor museum nurse office opera orchard oven painter palace parade park
        party patient pencil phone piano pilot planet plant player poem pond prison project puppet quarry race ranch
        recipe reef rifle river robot rocket roof sauna school sculptor shelf ship shop singer sofa soldier song spider
        stadium statue store street suit surgeon swimmer tailor teacher temple tenant theater ticket tower toy train
        tree truck tunnel valley vase vehicle village violin volcano wagon wallet warehouse wedding wheel wizard
        writer yacht zoo""".split()
    ),
    texts=tuple(
        """accent agency badge blend borough breed buyer camper captain category ceremony charm chief citizen client
        climate clan color comment company concept continent contract country county crest crop culture currency dealer
        decade dialect diet director disease dynasty editor emblem faculty fabric family farmer finish flavor fuel
        gender genre grade grain guard guest guide habitat hero hobby holder honor idiom industry insect insurer jersey
        judge kind label landlord leader league legend level liquid lord maker mascot master material medium mentor
        metal method mineral model mood motto muscle nation nickname origin owner partner pattern payee period person
        pet phase podium poet policy position prefix premium process producer profile program prophet protein province
        quality quarter rank reason referee region religion remark renter ritual rival sailor scent seller senator
        series shape sign sponsor stage status strain studio style subject supplier surname symbol team tenor texture
        theme title topic town trade trainer tribe trophy tutor unit usage variety vendor venue verdict victim
        weather winner wood zone""".split()
    ),
    numbers=tuple(
        """acreage age altitude amount amps angle area balance baggage bonus bounty breadth budget calories capacity
        carbon cargo charge circuit copies cost cycles damage days deaths debt decibels deficit density deposit depth
        diameter discount dosage duration earnings energy entries errors exports extent fare fat fee fibre fines floors
        force fund gain gallons girth goals grams gravity growth guests heat height hours humidity imports inches income
        injuries intake interest inventory kilos laps latency layers length lifts limits liters loan losses margin marks
        mass members meters miles minutes moisture mortgage noise orders output overtime oxygen pages payment penalty
        pints points pounds pressure price profit pulse quota radius rainfall rate rating refund rent revenue reviews
        reward risk rounds royalty salary sales savings score seats shares size slots speed stake stars steps stock
        strength stress sugar surplus tariff tax tenure throws tips toll tons torque traffic turnover vat velocity
        visits voltage volume votes wage warranty waste weight width wins yards yield""".split()
    ),
)

_VALIDATION = Words(
    tables=tuple(
        """aquarium archer balloon bishop bookcase canyon cathedral cheetah compass crater cruise dinner dolphin
        fountain furnace gymnast hangar journal knight lantern mansion meadow mosque nursery oasis parrot pavilion
        rabbit saloon satellite sheriff submarine tavern turbine vineyard whale""".split()
    ),
    texts=tuple(
        """ancestor author barber cadet cousin dentist district donor element fashion founder grammar heritage inspector
        keeper language lineage manager monarch neighbor outlook painting pastor prefect pupil rhythm routine species
        standard suburb tactic tenancy vintage visitor wrapper""".split()
    ),
    numbers=tuple(
        """accuracy births bytes clicks credit crowd digits drift expense flow frequency harvest impact karats
        lumens mileage octane passes pixels pupils ratio reach reserve spins strikes subsidy tempo threads thrust
        tokens units wattage wear weeks years""".split()
    ),
)

_TEST = Words(
    tables=tuple(
        """academy airport alley antique archive avenue baker beacon biker boiler bunker butcher cadaver candle
        carnival cashier chalet chimney clock cloud convent cricket cyclone dairy depot diver drone dune eagle elevator
        embassy falcon fjord fortress freighter galaxy gazelle grocer gym heron hostel igloo jockey kiosk lagoon
        lighthouse locker mall monk moth motel novel nebula obelisk octopus otter outpost pagoda panda pier plumber
        pirate pyramid quilt raft refinery rodeo salon scooter shrine sloop smith stable spa tanker
        telescope tractor trawler tiger tram umpire vault viaduct villa walrus windmill zeppelin""".split()
    ),
    texts=tuple(
        """admiral alias alloy anthem aroma backer bride brand butler caste coin colonel composer consul creed cuisine
        curator custom deputy delegate doctrine duke emperor enemy export faith feature fleet gem glaze governor herb
        hue jargon juice knot lender lyric magnate mayor militia minister motif mount nurture oracle parish patron
        pigment poison priest ranger relic rider salute scholar seal sector senate shade skipper spice spouse squad
        suspect swatch tailwind talent tenet tint tutee twin usher virus voter warden weapon witness""".split()
    ),
    numbers=tuple(
        """abrasion acidity airtime alcohol assets attendance bandwidth beats bids blocks burden bushels clearance
        clouds coins crashes crew curvature delay descent donors doses downtime drag dues elapse engines erosion faults
        flaws footage friction glow hazard hits horsepower jolts kilowatts knots leakage lag legs liability magnitude
        mpg nodes nectar ounces outlay overdraft pace patents pegs pitch plots premiums proof quarts range recoil rooms
        runs shifts shots slope span spend spread staff stipend surge taps tension thickness tickets torsion treaties
        upkeep vaults viewers vigor vitamin waves wingspan""".split()
    ),
)

SPLITS: dict[str, Words] = {"train": _TRAIN, "validation": _VALIDATION, "test": _TEST}
