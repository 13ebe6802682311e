"""The default prompts of a server audit: twelve unlike texts of unlike lengths.

The unit of the test is the prompt, and eleven are the fewest that reach alpha = 0.001. Lengths differ, so that the
generated tokens lie on both sides of several boundaries.
"""

DEFAULT_PROMPTS = {
    "p00_river": "The river rose overnight and by morning the lower fields lay under water, so the farmers moved",
    "p01_merge": "def merge(left, right):\n    result = []\n    while left and right:",
    "p02_hello": "Hello, how are",
    "p03_science": "In chemistry, a catalyst is a substance that speeds up a reaction without being used up. A "
    "common example from industry is the iron that helps nitrogen and hydrogen to form ammonia, "
    "because",
    "p04_list": "Shopping list: two loaves of bread, a dozen eggs, three lemons, a bag of rice and",
    "p05_letter": "Dear Mrs Kowalski, thank you for your letter of the third of March, in which you ask whether "
    "the repair of the roof can be brought forward. We have spoken with the builder, and he tells us "
    "that",
    "p06_numbers": "1, 2, 4, 8, 16, 32,",
    "p07_story": "When the lighthouse keeper opened the door, the storm had already taken the stairs, the railing "
    "and half of the wall. He looked down at the rocks, counted the seconds between two waves, and "
    "decided that it would be wiser to wait until the tide turned. In the meantime he",
    "p08_json": '{"name": "Ada", "born": 1815, "city": "London", "known_for": ["',
    "p09_recipe": "To bake a simple loaf, mix flour, water, salt and yeast, let the dough rest for an hour, then",
    "p10_history": "The printing press spread through Europe within fifty years of its invention. Before that, a "
    "book was copied by hand, which took months; afterwards the price of a book fell so far that "
    "students could own the works they studied. Historians still argue about the consequences, but "
    "most agree that",
    "p11_question": "Question: Which planet of the solar system has the most moons?\nAnswer:",
}
