"""Groups of concepts whose pictures could be called by each other's name."""

_GROUPS = """
car, taxi, police car, racing car, van, truck
train, locomotive, tram, bus
ship, motorboat, rowboat, sailboat, canoe
scooter, motorcycle, bicycle, tricycle
ambulance, van, bus, fire truck
chair, armchair, stool, bench, deck chair, sofa
bed, crib, sofa
table, desk, pool table, workbench
mug, coffee, bowl
cake, cupcake, pie, pudding
bread, baguette, sandwich
lamp, lamppost, lantern, chandelier, candle, bulb
clock, alarm clock, watch, stopwatch, mantelpiece clock, school
handbag, purse, shopping bag, backpack, money bag
glasses, sunglasses
computer, laptop, tablet, television
mobile phone, telephone, tablet
camera, video camera
dog, wolf
cat, tiger, leopard, lion
mouse, hamster, chipmunk
horse, donkey, zebra, rocking horse
fish, shark, aquarium, fishing rod
whale, dolphin, seal, shark
octopus, squid
lobster, shrimp
beetle, ladybug
fly, mosquito, bee
oak, pine, palm, christmas tree, bush
potted plant, sprout, clover, bush, cactus, maple leaf
rose, tulip, hibiscus, sunflower, lotus, hyacinth, cherry blossom, bouquet, potted plant
pepper, chili
book, notebook, folder, calendar
pen, pencil, crayon, paintbrush
box, gift, crate
trash can, bucket, basket
house, dog house, doll house, tent, hotel, bank, school, hospital, store
doll, teddy bear
star, sun
shirt, jacket, coat, suit
glove, boxing glove
racket, tennis racket, paddle
ice skate, roller skate, skateboard, sneaker, boot
radio, speaker
chick, chicken, rooster, turkey
duck, goose, swan
rice, rice ball
wine, cocktail, champagne, wine bottle, whiskey
guitar, banjo, violin
suitcase, briefcase
ring, gem, crown
fireplace, fire, candle, lantern
cake, candle
mouse trap, mouse, cheese
snowman, top hat
map, globe
helmet, cap, graduation cap
sun hat, top hat, cap
umbrella, parasol
keyboard, piano
joystick, gamepad
coin, medal
knife, chopping board
flask, test tube
safe, wardrobe
barrel, drum
letter, ticket
cloud, lightning
church, castle, mosque
monkey, gorilla
elevator, door, wardrobe
mushroom, pizza
lemon, lime
teapot, mug
plate, bowl, pot
pool ball, pool table
tie, scarf, shirt, suit
turtle, snail
stone, brick
hook, anchor
plug, battery
painting, map
mirror, window
ski, sled
water pistol, drill
sink, bathtub, toilet
refrigerator, washing machine, safe
oven, microwave, washing machine
"""
LOOKALIKES = tuple(frozenset(name.strip() for name in line.split(",")) for line in _GROUPS.strip().splitlines())
"""Where one of a group is in a picture, nothing is asked about the others."""
