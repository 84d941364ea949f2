"""The ten plots of the story grammar, as templates.

A plot is a list of sentences, one to a line; lines that begin with `|` are other ways to say the sentence
above them, and `@friend` introduces the friend. The fields in braces are filled in by `stories.py`: the hero
(`hero`, `they`, `them`, `their`), the friend (`friend`, `a_fkind`, `fthey`, `ftheir`), a treasure and its
colour, and draws of the plot's own. All sentences were written for this project.
"""

FRIEND = """
{Their} best friend was {a_fkind} named {friend}.
| Next door lived {a_fkind} named {friend}.
| {They} had a good friend, {a_fkind} named {friend}.
"""

OPENING = """
Once upon a time, there was {who} who lived {home}.
| Once upon a time, there was {who} who lived {home}.
| Once upon a time, {who} lived {home}.
| Once upon a time, {home}, there lived {who}.
| There once was {who} who lived {home}.
| Long ago, {who} lived {home}.
| {hero} was {a_trait} {kind} who lived {home}.
| In a little house {home} lived {who}.
"""

ENDING = """
From that day on, {hero} and {friend} were the best of friends.
| That night, {hero} went to sleep feeling {feeling}.
| {hero} was very {feeling}, and so was {friend}.
| And {hero} never forgot that day.
| And they all lived happily ever after.
| The end.
"""

LOST = """
{They} had {a_colour} {treasure} that {they} loved very much.
| What {they} loved most was {their} {colour} {treasure}.
One morning, the {treasure} was gone.
| One day, {they} could not find the {treasure}.
{hero} looked {spot}, but the {treasure} was not there.
@friend
"Do not worry, {hero}," said {friend}. "Let us look {spot2}."
| "I saw something {colour} {spot2}," said {friend}.
They went together, and there was the {colour} {treasure}!
| And there it was, the {colour} {treasure}, just where {friend} had said.
"""

STORM = """
@friend
One evening, a great storm came.
| One night, the wind began to howl and the rain fell hard.
The storm broke the roof of {friend}'s house.
| The rain ran through the roof of {friend}'s house.
{hero} took a lantern and went out to fetch {friend}.
| {hero} heard {friend} call and opened the door at once.
"Come in and stay with me," said {hero}.
They sat by the fire and shared some {meal}.
| {They} made some {meal} for both of them.
In the morning the sun came out, and they mended the roof together.
| When the storm was over, they walked back and repaired {friend}'s roof.
"""

GIFT = """
@friend
It was almost {friend}'s birthday, and {hero} had no gift.
| The next day was {friend}'s birthday, so {hero} needed a gift.
{They} had no money, so {they} decided to make {a_colour} {treasure}.
| "I will make {a_colour} {treasure}," {they} said.
{They} worked all day and half the night.
| {They} worked slowly and with great care.
"What if {friend} does not like it?" {they} thought.
But when {friend} opened the box, {fthey} smiled from ear to ear.
| But {friend} held up the {treasure} and laughed with joy.
"This {treasure} is the best gift of all," said {friend}.
"""

RESCUE = """
@friend
One day, {hero} heard a cry for help.
| One afternoon, somebody called {hero}'s name.
It was {friend}, who was stuck {place}.
"Wait there, I will get the {tool}!" shouted {hero}.
| {hero} ran home to get the {tool}.
The {tool} was heavy, but {hero} did not give up.
| {They} was afraid, but {they} came back with the {tool} as fast as {they} could.
With the {tool}, {friend} was soon safe again.
| Thanks to the {tool}, {friend} was soon back home.
"You saved me, {hero}," said {friend}.
"""

LEARN = """
More than anything, {hero} wanted to learn to {skill}.
On the first day {they} tried, and it went wrong.
| The first time {they} tried, everybody laughed.
On the second day it went wrong again, and {they} was sad.
| {They} went home and almost gave up.
Then {a_fkind} named {friend} came by.
"I can teach you to {skill}," said {friend}.
| "I could not {skill} at first either," said {friend}.
They practised together every day for a week.
| Every evening, {friend} helped {them} a little.
At last {hero} could {skill} better than anyone.
| In the end, {hero} could {skill} very well.
"""

GARDEN = """
In spring, {they} found a small bag of seeds.
| In spring, the wind brought a few seeds to the door.
{They} put the seeds in the ground and watered them every day.
| {They} planted them behind the house and waited.
For a long time, nothing happened.
| Days went by, and nothing could be seen.
"Be patient," said {their} friend {friend}, the {fkind}.
| "Good things take time," said {their} friend {friend}, the {fkind}.
Then, in summer, the garden was full of {food}.
| One warm morning, there were {food} everywhere.
There were so many {food} that {hero} could not eat them all.
So {they} shared the {food} with {friend} and all the neighbours.
| So {they} invited {friend}, and together they ate {food} until the moon came up.
"""

TRADE = """
{They} owned {a_colour} {treasure}, but {they} wished for {a_other}.
@friend
{friend} had a fine {other}.
| One day, {friend} showed {them} a shiny {other}.
"Will you give me your {other} for my {treasure}?" asked {hero}.
{friend} agreed, and they traded.
| "Gladly," said {friend}, and they traded.
But that night {hero} missed {their} old {treasure}.
| Soon, though, {they} missed the {treasure}.
{friend} laughed and gave the {treasure} back.
| "Then let us share both," said {friend}.
"""

KEY = """
One day, {they} found {a_colour} key {spot}.
| While walking, {hero} saw {a_colour} key on the path.
{They} tried the key at the {house}, but the door stayed shut.
{They} tried the {house2}, but the key did not fit.
"Try the {house3}," said {friend}, {a_fkind} who was passing by.
At the {house3}, the key turned with a click.
| And at the {house3}, the door swung open.
Inside, in a small box, was {a_treasure}.
| Inside, on a table, lay a beautiful {treasure}.
{hero} gave the key to {friend} and kept the {treasure}.
| From then on, {hero} and {friend} met there every day.
"""

NEWCOMER = """
{They} had nobody to play with.
| The days were long, and {hero} was lonely.
Then {a_fkind} named {friend} moved into the house next door.
| One day, {a_fkind} named {friend} came to live nearby.
{hero} was too shy to say hello.
| {hero} wanted to say hello but did not dare.
So {they} left some {meal} at {friend}'s door.
| So {they} made some {meal} and carried it over.
{friend} tasted the {meal} and smiled.
"This is the best {meal_noun} I have ever had," said {friend}. "Will you be my friend?"
{hero} said yes at once.
| "Yes, please," said {hero}.
"""

RACE = """
Every year there was a race, and the prize was {a_colour} {treasure}.
| One day there was a race for {a_colour} {treasure}.
{hero} ran against {friend}, {a_fkind} who was very fast.
Halfway there, {friend} fell and hurt {ftheir} foot.
| Near the end, {friend} slipped in the mud.
{hero} could have won, but {they} stopped to help.
| {hero} stopped at once and helped {friend} up.
They crossed the line side by side.
| Arm in arm, they came in last.
Everyone cheered, and the {colour} {treasure} went to both of them.
| The judges gave the {colour} {treasure} to {hero} for {their} kind heart.
"""

PLOTS = {
    "lost": LOST, "storm": STORM, "gift": GIFT, "rescue": RESCUE, "learn": LEARN,
    "garden": GARDEN, "trade": TRADE, "key": KEY, "newcomer": NEWCOMER, "race": RACE,
}  # fmt: skip
TREASURE_PLOTS = ("lost", "gift", "trade", "key", "race")
