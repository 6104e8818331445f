"""Pure renaming: published key layouts to the zoo's, one new name for every old one."""
